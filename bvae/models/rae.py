"""The networks of the regularised autoencoder (Ghosh et al. 2020): the WAE's, with other inputs, kernels and norms."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from bvae.config.registry import Part
from bvae.models.layers import need_batch, need_sides
from bvae.models.resnet import glorot_
from bvae.models.wae import ConvDecoder, ConvEncoder, Norm, smallest_map

if TYPE_CHECKING:
    from bvae.config import Config

Variant = Literal["cifar10", "celeba"]
Spectral = Literal["none", "decoder", "all"]
KERAS = Norm(1e-3, 0.99)


def bounded_log_sigma(x: Tensor) -> Tensor:
    """The log sigma of the authors' VAEs: within +-5."""
    return 5 * torch.tanh(x)


@dataclass(frozen=True, kw_only=True)
class RaeSettings:
    """Settings of network `rae`."""

    rae_variant: Variant = "cifar10"
    """`cifar10`: 4x4 kernels, the authors' network for MNIST too; `celeba`: 5x5 kernels."""
    rae_spectral: Spectral = "none"
    """Spectral norm: in no layer; in the transposed and dense ones (`decoder`); in every one (`all`)."""


def doublings(variant: Variant) -> int:
    """How often the decoder doubles the side: 2^doublings must divide it."""
    return 3 if variant == "celeba" else 2


def rae(
    channels: int,
    height: int,
    width: int,
    latents: int,
    variant: Variant = "cifar10",
    spectral: Spectral = "none",
    deterministic: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) for images [B,channels,height,width].

    Raises UserError where 4, for `celeba` 8, does not divide both sides.
    """
    need_sides("rae", height, width, 2 ** doublings(variant))
    size = (channels, height, width, latents)
    kernel = 5 if variant == "celeba" else 4
    encoder = ConvEncoder(
        *size,
        kernel=kernel,
        strides=(2, 2, 2, 2),
        norm=KERAS,
        signed=variant == "cifar10",
        spectral_convolutions=spectral == "all",
        spectral_dense=spectral != "none",
        log_sigma_of=bounded_log_sigma,
        deterministic=deterministic,
    )
    decoder = ConvDecoder(
        *size, kernel=kernel, doublings=doublings(variant), norm=KERAS, relu=False, spectral=spectral != "none"
    )
    glorot_(encoder)
    glorot_(decoder)
    return encoder, decoder


def build(c: "Config", deterministic: bool = False) -> tuple[nn.Module, nn.Module]:
    own = c.part(RaeSettings)
    return rae(*c.image_shape, c.latents, own.rae_variant, own.rae_spectral, deterministic)


def check(c: "Config") -> None:
    """Raises UserError for sides that the decoder cannot double its way to, and for one pixel in a batch of one."""
    need_sides("rae", c.height, c.width, 2 ** doublings(c.part(RaeSettings).rae_variant))
    need_batch(c.batch, smallest_map(c.height, c.width, 4))


RAE = Part("rae", build, check, settings=RaeSettings)
