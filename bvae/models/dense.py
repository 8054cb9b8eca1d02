"""The second stage's networks: a dense VAE over the first stage's latents (Dai & Wipf 2019, section 4)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from bvae.models.half import Head, LinearReLU, widened
from bvae.models.resnet import glorot_, posterior_heads


class _DenseTrunk(nn.Module):
    """[B,inputs] -> [B,hidden+inputs]: ReLU layers, with the input concatenated to the last one's output."""

    def __init__(self, inputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        widths = [inputs] + [hidden] * depth
        self.layers = nn.ModuleList(LinearReLU(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = layer(h)
        # The heads compute in float32: they carry the posterior and the reconstruction of float32 latents.
        return torch.cat([widened(x), widened(h)], 1)


class DenseEncoder(nn.Module):
    """Latents [B,inputs] -> (mu, log_sigma), each [B,latents] float32, whatever the autocast."""

    def __init__(self, inputs: int, latents: int, hidden: int, depth: int = 3) -> None:
        super().__init__()
        self.trunk = _DenseTrunk(inputs, hidden, depth)
        self.mu = Head(hidden + inputs, latents)
        self.log_sigma = Head(hidden + inputs, latents)
        glorot_(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return posterior_heads(self.trunk(x), self.mu, self.log_sigma)


class DenseDecoder(nn.Module):
    """Second-stage latents [B,latents] -> first-stage latents [B,outputs] float32."""

    def __init__(self, latents: int, outputs: int, hidden: int, depth: int = 3) -> None:
        super().__init__()
        self.trunk = _DenseTrunk(latents, hidden, depth)
        self.out = Head(hidden + latents, outputs)
        glorot_(self)

    def forward(self, u: Tensor) -> Tensor:
        return self.out(self.trunk(u))
