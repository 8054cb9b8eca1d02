"""The prior that a VAE is trained with."""

import math

import torch
from torch import Tensor

from bvae import ops
from bvae.models.priors.base import Prior


class NormalPrior(Prior):
    """N(0, I). It is not fitted."""

    name = "normal"

    @torch.no_grad()
    def sample(self, n: int, rng: Tensor) -> Tensor:
        return ops.philox_normal(rng, n, self.latents)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        return standard_normal_log_prob(z)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats: [...,k] -> [...] float64."""
    return -0.5 * (z.double().square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
