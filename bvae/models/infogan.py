"""The network of Dai & Wipf's tables (2019; `Infogan` in their code), after InfoGAN's (Chen et al. 2016)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.config.registry import Part
from bvae.models.layers import (
    ConvTranspose,
    Dense,
    SpectralConv,
    SpectralDense,
    SpectralHead,
    gaussian_,
    need_batch,
    need_sides,
    normalized_rows,
    to_maps,
    to_rows,
)
from bvae.models.norm import BatchNorm2d, BatchNormReLU

if TYPE_CHECKING:
    from bvae.config import Config

WIDTH = 1024  # width of the dense layers
STD = 0.02  # standard deviation of initial weights
SLOPE = 0.2  # slope of the leaky ReLU
SMALLEST_SIGMA = 1e-6


class InfoGANEncoder(nn.Module):
    """Images [B,C,H,W] in [0,1] -> (mu, log_sigma), each [B,k] float32 whatever the autocast.

    sigma = 1e-6 + softplus(.) instead of an exponential. Spectral norm in every layer. Where `deterministic`, mu alone.
    """

    def __init__(self, channels: int, height: int, width: int, latents: int, deterministic: bool = False) -> None:
        super().__init__()
        self.deterministic = deterministic
        self.conv1 = SpectralConv(channels, 64, 4, 2)
        self.conv2 = SpectralConv(64, 128, 4, 2, cancelled=True)
        self.bn2 = BatchNorm2d(128)
        self.fc3 = SpectralDense(128 * (height // 4) * (width // 4), WIDTH, cancelled=True)
        self.bn3 = BatchNorm2d(WIDTH)
        # One layer for mu and sigma: they share its singular value.
        self.posterior = SpectralHead(WIDTH, latents if deterministic else 2 * latents)
        gaussian_(self, STD)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = F.leaky_relu(self.conv1(x), SLOPE)
        y = F.leaky_relu(self.bn2(self.conv2(y)), SLOPE)
        y = F.leaky_relu(normalized_rows(self.bn3, self.fc3(to_rows(y))), SLOPE)
        # The posterior stays in fp32: rounding log_sigma to bf16 moves the KL of a sharp latent by percents.
        with torch.autocast(y.device.type, enabled=False):
            y = self.posterior(y.float())
            if self.deterministic:
                return y
            mu, a = y.chunk(2, 1)
            return mu, torch.log(SMALLEST_SIGMA + F.softplus(a))


class InfoGANDecoder(nn.Module):
    """Latents [B,k] -> logits [B,C,H,W]; the image is their sigmoid. No spectral norm."""

    def __init__(self, channels: int, height: int, width: int, latents: int) -> None:
        super().__init__()
        self.start = (128, height // 4, width // 4)
        features = 128 * (height // 4) * (width // 4)
        self.fc1 = Dense(latents, WIDTH, cancelled=True)
        self.bn1 = BatchNormReLU(WIDTH)
        self.fc2 = Dense(WIDTH, features, cancelled=True)
        self.bn2 = BatchNormReLU(features)
        self.up3 = ConvTranspose(128, 64, 4, 2, cancelled=True)
        self.bn3 = BatchNormReLU(64)
        self.up4 = ConvTranspose(64, channels, 4, 2)
        gaussian_(self, STD)

    def forward(self, z: Tensor) -> Tensor:
        y = normalized_rows(self.bn1, self.fc1(z))
        y = normalized_rows(self.bn2, self.fc2(y))
        return self.up4(self.bn3(self.up3(to_maps(y, *self.start))))


def infogan(
    channels: int, height: int, width: int, latents: int, deterministic: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) for images [B,channels,height,width]. Raises UserError where 4 does not divide both sides."""
    need_sides("infogan", height, width, 4)
    return (
        InfoGANEncoder(channels, height, width, latents, deterministic),
        InfoGANDecoder(channels, height, width, latents),
    )


def build(c: "Config", deterministic: bool = False) -> tuple[nn.Module, nn.Module]:
    return infogan(*c.image_shape, c.latents, deterministic)


def check(c: "Config") -> None:
    """Raises UserError for sides that 4 does not divide, and for a batch of one image."""
    need_sides("infogan", c.height, c.width, 4)
    need_batch(c.batch, 1)


INFOGAN = Part("infogan", build, check)
