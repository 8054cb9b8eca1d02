"""The convolutional networks of the Wasserstein autoencoder (Tolstikhin et al. 2018) and Dai & Wipf's copy (2019)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from bvae.config.registry import Part
from bvae.models.layers import (
    Conv,
    ConvTranspose,
    Dense,
    Heads,
    SpectralConv,
    SpectralConvTranspose,
    SpectralDense,
    SpectralHead,
    gaussian_,
    need_batch,
    need_sides,
    to_maps,
    to_rows,
    unchanged,
)
from bvae.models.norm import BatchNormReLU
from bvae.models.resnet import glorot_

if TYPE_CHECKING:
    from bvae.config import Config

WIDTHS = (128, 256, 512, 1024)


class Norm(NamedTuple):
    """Settings of batch norm."""

    eps: float
    decay: float


def smallest_map(height: int, width: int, halvings: int) -> int:
    """Pixels of the encoder's last feature map."""
    return -(-height >> halvings) * -(-width >> halvings)


class ConvEncoder(nn.Module):
    """Images [B,C,H,W] in [0,1] -> (mu, log_sigma), each [B,k] float32; where `deterministic`, mu alone.

    Convolutions to 128, 256, 512 and 1024 channels, each followed by batch norm and ReLU; dense heads.

    Args:
        kernel: 4 or 5 pixels.
        strides: of the four convolutions.
        signed: map the image to [-1,1] first.
        spectral: which layers have spectral norm; of the heads, mu alone has it.
        log_sigma_of: makes log_sigma of its dense layer's output.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        latents: int,
        *,
        kernel: int,
        strides: Sequence[int],
        norm: Norm,
        signed: bool = False,
        spectral_convolutions: bool = False,
        spectral_dense: bool = False,
        log_sigma_of: Callable[[Tensor], Tensor] = unchanged,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.deterministic = deterministic
        self.signed = signed
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for (inputs, outputs), stride in zip(pairwise((channels, *WIDTHS)), strides, strict=True):
            if spectral_convolutions:
                conv: Conv = SpectralConv(inputs, outputs, kernel, stride, cancelled=True, u_of="rows")
            else:
                conv = Conv(inputs, outputs, kernel, stride, cancelled=True)
            self.convs.append(conv)
            self.norms.append(BatchNormReLU(outputs, norm.eps, norm.decay))
            height, width = -(-height // stride), -(-width // stride)
        features = WIDTHS[-1] * height * width
        mu = SpectralHead(features, latents, u_of="rows") if spectral_dense else None
        self.heads = Heads(features, latents, deterministic, log_sigma_of, mu)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = 2 * x - 1 if self.signed else x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(y))
        return self.heads(to_rows(y))


class ConvDecoder(nn.Module):
    """Latents [B,k] -> logits [B,C,H,W]; the image is their sigmoid.

    A dense layer to 1024 maps of H/2^doublings x W/2^doublings; `doublings` transposed convolutions, each with half the
    channels, batch norm and ReLU; one of stride 1 to the image.

    Args:
        kernel: 4 or 5 pixels.
        relu: a ReLU follows the dense layer.
        spectral: spectral norm in every layer.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        latents: int,
        *,
        kernel: int,
        doublings: int,
        norm: Norm,
        relu: bool,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.start = (WIDTHS[-1], height >> doublings, width >> doublings)
        features = self.start[0] * self.start[1] * self.start[2]
        self.fc: Dense = SpectralDense(latents, features, u_of="rows") if spectral else Dense(latents, features)
        transposed = SpectralConvTranspose if spectral else ConvTranspose
        self.ups = nn.ModuleList()
        self.norms = nn.ModuleList()
        widths = [WIDTHS[-1] >> i for i in range(doublings + 1)]
        for inputs, outputs in pairwise(widths):
            self.ups.append(transposed(inputs, outputs, kernel, 2, cancelled=True))
            self.norms.append(BatchNormReLU(outputs, norm.eps, norm.decay))
        self.out = transposed(widths[-1], channels, kernel, 1)

    def forward(self, z: Tensor) -> Tensor:
        y = self.fc(z)
        y = to_maps(F.relu(y) if self.relu else y, *self.start)
        for up, norm in zip(self.ups, self.norms, strict=True):
            y = norm(up(y))
        return self.out(y)


Variant = Literal["dai-wipf", "celeba", "mnist"]
GAUSSIAN = 0.01  # standard deviation of the WAE authors' initial weights
LARGEST_LOG_VARIANCE = 50.0
TF1 = Norm(1e-5, 0.999)
TOLSTIKHIN = Norm(1e-5, 0.9)


def half_of_log_variance(x: Tensor) -> Tensor:
    """The WAE authors' layer gives log sigma^2, clipped to +-50."""
    return 0.5 * x.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)


@dataclass(frozen=True, kw_only=True)
class WaeSettings:
    """Settings of network `wae`."""

    wae_variant: Variant = "dai-wipf"
    """`dai-wipf`: theirs, whose first convolution has stride 1; `celeba`, `mnist`: those of the WAE paper."""


def doublings(variant: Variant) -> int:
    """How often the decoder doubles the side: 2^doublings must divide it."""
    return 2 if variant == "mnist" else 3


def wae(
    channels: int,
    height: int,
    width: int,
    latents: int,
    variant: Variant = "dai-wipf",
    deterministic: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) for images [B,channels,height,width].

    Raises UserError where 8, for `mnist` 4, does not divide both sides.
    """
    need_sides("wae", height, width, 2 ** doublings(variant))
    size = (channels, height, width, latents)
    theirs = variant == "dai-wipf"
    kernel, norm = 4 if variant == "mnist" else 5, TF1 if theirs else TOLSTIKHIN
    encoder = ConvEncoder(
        *size,
        kernel=kernel,
        strides=(1 if theirs else 2, 2, 2, 2),
        norm=norm,
        log_sigma_of=unchanged if theirs else half_of_log_variance,
        deterministic=deterministic,
    )
    decoder = ConvDecoder(*size, kernel=kernel, doublings=doublings(variant), norm=norm, relu=True)
    for network in (encoder, decoder):
        if theirs:
            glorot_(network)
        else:
            gaussian_(network, GAUSSIAN)
    return encoder, decoder


def build(c: "Config", deterministic: bool = False) -> tuple[nn.Module, nn.Module]:
    return wae(*c.image_shape, c.latents, c.part(WaeSettings).wae_variant, deterministic)


def check(c: "Config") -> None:
    """Raises UserError for sides that the decoder cannot double its way to, and for one pixel in a batch of one."""
    variant = c.part(WaeSettings).wae_variant
    need_sides("wae", c.height, c.width, 2 ** doublings(variant))
    need_batch(c.batch, smallest_map(c.height, c.width, 3 if variant == "dai-wipf" else 4))


WAE = Part("wae", build, check, settings=WaeSettings)
