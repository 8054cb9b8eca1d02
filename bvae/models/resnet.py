"""The first stage's networks: the ResNet of Dai & Wipf (2019) that Asperti & Trentin (2020, Fig. 1) use."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import reference
from bvae.config.registry import Part
from bvae.errors import UserError
from bvae.models import fork, layer_ops
from bvae.models.conv import Conv3x3, ConvTranspose3x3
from bvae.models.half import Head, Linear, LinearReLU, widened
from bvae.models.norm import BatchNormReLU
from bvae.models.plain import layers_are_plain

if TYPE_CHECKING:
    from bvae.config import Config

MAX_DECODER_CHANNELS = 1024


def glorot_(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases for every convolution and dense layer of `module`, as in TF 1."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def posterior_heads(h: Tensor, mu: nn.Linear, log_sigma: nn.Linear) -> tuple[Tensor, Tensor]:
    """mu(h) and log_sigma(h) in one product; in float32 whatever the autocast.

    Rounding log_sigma to bf16 would move the KL of a sharp latent by percents.
    """
    with torch.autocast(h.device.type, enabled=False):
        weight, bias = torch.cat([mu.weight, log_sigma.weight]), torch.cat([mu.bias, log_sigma.bias])
        first, second = F.linear(widened(h), widened(weight), widened(bias)).split(
            [len(mu.bias), len(log_sigma.bias)], 1
        )
        return first, second


class ResidualBlock(nn.Module):
    """[BN-ReLU-conv3x3] x 2 beside a 3x3 convolution as the shortcut, of x plus a bias `offset` that it still lacks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = BatchNormReLU(channels)
        self.conv1 = Conv3x3(channels, channels, cancelled=True, apart=True)
        self.bn2 = BatchNormReLU(channels)
        self.conv2 = Conv3x3(channels, channels, apart=True)
        self.shortcut = Conv3x3(channels, channels, apart=True)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        h, x = self.bn1.beside(x, offset)
        (beside, bias_beside), join = fork.beside(self.shortcut.apart, x)
        h = self.bn2(*self.conv1.apart(h))
        y, bias = self.conv2.apart(h)
        join(beside)
        if bias is None or bias_beside is None:
            return y + beside
        module = reference if layers_are_plain() else layer_ops
        return module.add_biased(y, beside, bias, bias_beside, self.bn2.counters)


class DenseResidualBlock(nn.Module):
    """[ReLU-dense] x 2 beside a dense shortcut, no normalisation."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense1 = LinearReLU(inputs, width)
        self.dense2 = Linear(width, width)
        self.shortcut = Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(self.dense1(F.relu(x))) + self.shortcut(x)


class ScaleBlock(nn.Sequential):
    """Residual blocks, one behind the other; `offset` as the first of them takes it."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__(*(ResidualBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        for block in self:
            x, offset = block(x, offset), None
        return x


class ResNetEncoder(nn.Module):
    """Images [B,C,H,W] in [0,1] -> (mu, log_sigma), each [B,k] float32, whatever the autocast.

    Where `deterministic`, mu alone.
    """

    def __init__(
        self,
        channels: int,
        latents: int,
        scales: int,
        blocks: int,
        base: int,
        fc: int,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.deterministic = deterministic
        width = base
        self.conv0 = Conv3x3(channels, width, apart=True)
        self.scales = nn.ModuleList()
        self.downsample = nn.ModuleList()
        for i in range(scales):
            self.scales.append(ScaleBlock(width, blocks))
            if i + 1 < scales:
                self.downsample.append(Conv3x3(width, 2 * width, stride=2, apart=True))
                width *= 2
        self.fc = DenseResidualBlock(width, fc)
        self.mu = Head(fc, latents)
        self.log_sigma = None if deterministic else Head(fc, latents)
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.scales[0](*self.conv0.apart(x))
        for down, scale in zip(self.downsample, self.scales[1:], strict=True):
            y = scale(*down.apart(y))  # type: ignore[operator]
        h = self.fc(y.mean((2, 3)))
        return self.mu(h) if self.log_sigma is None else posterior_heads(h, self.mu, self.log_sigma)


class ResNetDecoder(nn.Module):
    """Latents [B,k] -> logits [B,C,side,side]; the image is their sigmoid."""

    def __init__(self, channels: int, latents: int, side: int, blocks: int, base: int) -> None:
        super().__init__()
        doublings = int(math.log2(side)) - 1  # from 2x2 to side x side
        widths = [min(base << i, MAX_DECODER_CHANNELS) for i in range(doublings, -1, -1)]
        self.width0 = widths[0]
        self.fc = Linear(latents, 4 * widths[0])
        self.upsample = nn.ModuleList()
        self.scales = nn.ModuleList()
        for wide, narrow in pairwise(widths):
            self.upsample.append(ConvTranspose3x3(wide, narrow, apart=True))
            self.scales.append(ScaleBlock(narrow, blocks))
        self.conv = Conv3x3(widths[-1], channels)
        glorot_(self)

    def forward(self, z: Tensor) -> Tensor:
        y = self.fc(z).view(-1, 2, 2, self.width0).permute(0, 3, 1, 2)  # channels_last from the start
        for up, scale in zip(self.upsample, self.scales, strict=True):
            y = scale(*up.apart(y))  # type: ignore[operator]
        return self.conv(y)


def build(c: "Config", deterministic: bool = False) -> tuple[ResNetEncoder, ResNetDecoder]:
    """The ResNet over images [B,C,side,side]; the decoder gives logits."""
    return (
        ResNetEncoder(c.channels, c.latents, c.scales, c.blocks, c.base, c.fc, deterministic),
        ResNetDecoder(c.channels, c.latents, c.height, c.blocks, c.base),
    )


def check(c: "Config") -> None:
    """Raises UserError for a side that is no power of two, and for more scales than it has halvings."""
    side = c.height
    if c.width != side or side < 4 or side & (side - 1):
        asked = side if c.width == side else f"{side}x{c.width}"
        raise UserError(f"--side must be a power of two from 4 for --network resnet, not {asked}")
    fits = int(math.log2(side)) + 1
    if c.scales > fits:
        raise UserError(f"--scales {c.scales} does not fit a side of {side}: at most {fits}")
    if c.batch == 1 and side >> (c.scales - 1) == 1:
        raise UserError("--batch 1 needs fewer --scales: batch norm cannot normalise one pixel")


RESNET = Part("resnet", build, check, uses=("scales", "blocks", "base", "fc", "l2", "l2_on"))
