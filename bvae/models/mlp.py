"""The dense VAE of Asperti & Trentin's Fig. 4: 784-512-256-2k for MNIST, and back."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from bvae.config.registry import Part
from bvae.models.half import Linear
from bvae.models.layers import Heads, to_maps, to_rows
from bvae.models.resnet import glorot_

if TYPE_CHECKING:
    from bvae.config import Config

WIDTHS = (512, 256)


def _dense(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(Linear(inputs, outputs) for inputs, outputs in pairwise(widths))


class MLPEncoder(nn.Module):
    """Images [B,C,H,W] in [0,1] -> (mu, log_sigma), each [B,k] float32; where `deterministic`, mu alone."""

    def __init__(self, channels: int, height: int, width: int, latents: int, deterministic: bool = False) -> None:
        super().__init__()
        self.deterministic = deterministic
        self.layers = _dense(channels * height * width, *WIDTHS)
        self.heads = Heads(WIDTHS[-1], latents, deterministic)
        glorot_(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = to_rows(x)
        for layer in self.layers:
            y = F.relu(layer(y))
        return self.heads(y)


class MLPDecoder(nn.Module):
    """Latents [B,k] -> logits [B,C,H,W]; the image is their sigmoid."""

    def __init__(self, channels: int, height: int, width: int, latents: int) -> None:
        super().__init__()
        self.image = (channels, height, width)
        self.layers = _dense(latents, *reversed(WIDTHS))
        self.out = Linear(WIDTHS[0], channels * height * width)
        glorot_(self)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = F.relu(layer(z))
        return to_maps(self.out(z), *self.image)


def mlp(
    channels: int, height: int, width: int, latents: int, deterministic: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) for images [B,channels,height,width] of any size."""
    return MLPEncoder(channels, height, width, latents, deterministic), MLPDecoder(channels, height, width, latents)


def build(c: "Config", deterministic: bool = False) -> tuple[nn.Module, nn.Module]:
    return mlp(*c.image_shape, c.latents, deterministic)


MLP = Part("mlp", build)
