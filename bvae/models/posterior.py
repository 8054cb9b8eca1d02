"""The encoder's output over a data set, and the latents drawn from it."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from bvae import ops


class Posterior(NamedTuple):
    """q(z|x) of N images."""

    mu: Tensor
    """[N,k] float32"""
    log_sigma: Tensor | None
    """[N,k] float32; None for a deterministic encoder, whose z is mu"""

    def rows(self, index: Tensor) -> Self:
        """The posterior of the images at `index`, int64 [n]."""
        log_sigma = None if self.log_sigma is None else self.log_sigma.index_select(0, index)
        return type(self)(self.mu.index_select(0, index), log_sigma)

    def draw(self, rng: Tensor) -> Tensor:
        """z = mu + sigma eps, [N,k] float32, with fresh eps: advances `rng` (int64 [2] of bvae.ops.make_rng)."""
        return self.mu if self.log_sigma is None else ops.sample_kl(self.mu, self.log_sigma, rng).z

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [k] and covariance [k,k] of z over images and noise, float64 and exact: Cov(mu) + diag(E[sigma^2])."""
        mu = self.mu.double()
        mean = mu.mean(0)
        centred = mu - mean
        covariance = centred.T @ centred / len(mu)
        if self.log_sigma is not None:
            covariance += torch.diag((2 * self.log_sigma.double()).exp().mean(0))
        return mean, covariance
