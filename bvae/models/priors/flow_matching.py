"""Flow matching over whitened latents (Lipman et al. 2023; Liu et al. 2023): a velocity field from noise to codes."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import ops
from bvae.errors import UserError
from bvae.models.priors.base import CHUNK, Codes, FittedPrior, Progress
from bvae.models.priors.normal import standard_normal_log_prob
from bvae.models.priors.training import autocast, seeded, train
from bvae.seeds import derive

FREQUENCIES = 16  # number of frequencies in the time features
DECAY = 0.999  # decay of the moving average of the weights


@dataclass(frozen=True)
class FlowMatchingSettings:
    """Settings of the prior `flow-matching`."""

    flow_matching_steps: int = 20_000
    """Training steps."""
    flow_matching_batch: int = 512
    """Codes per training step."""
    flow_matching_width: int = 512
    """Width of the velocity network."""
    flow_matching_depth: int = 4
    """Residual blocks of the velocity network."""
    flow_matching_lr: float = 1e-3
    """Adam's highest learning rate."""
    flow_matching_heun: int = 50
    """Steps of Heun's method from noise to a latent; each evaluates the network twice."""


class Velocity(nn.Module):
    """v(w, t) [n,k] of whitened latents w [n,k] at times t [n], preconditioned.

    Were the codes N(0, I), as far as mean and covariance go they are, the best velocity would be

        E[z - u | w] = a(t) w,   a = (2t - 1) / s^2,   s^2 = t^2 + (1 - t)^2 = Var(w_t),   Var(z - u | w) = 1 / s^2

    The network adds what is not Gaussian, from an input and to an output of unit variance:
    v = a w + net(w / s, t) / s. It starts at 0, so that an untrained prior is the Gaussian.
    """

    def __init__(self, latents: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(latents, width)
        self.time = nn.Linear(2 * FREQUENCIES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, latents)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("frequencies", math.pi * torch.logspace(-1, 2.5, FREQUENCIES, base=2), persistent=False)

    frequencies: Tensor

    def residual(self, w: Tensor, t: Tensor) -> Tensor:
        """net(w / s, t) [n,k] float32."""
        angles = t[:, None] * self.frequencies
        h = self.first(w / spread(t)[:, None]) + self.time(torch.cat([angles.cos(), angles.sin()], 1))
        for block in self.blocks:
            h = block(h)
        return self.last(F.silu(h)).float()

    def forward(self, w: Tensor, t: Tensor) -> Tensor:
        s = spread(t)[:, None]
        return slope(t)[:, None] * w + self.residual(w, t) / s


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(F.silu(self.norm(h)))


def spread(t: Tensor) -> Tensor:
    """s, the standard deviation of w_t = (1 - t) u + t z for independent u and z of unit variance."""
    return (t.square() + (1 - t).square()).sqrt()


def slope(t: Tensor) -> Tensor:
    """a(t) = (2t - 1) / s^2."""
    return (2 * t - 1) / (t.square() + (1 - t).square())


class FlowMatchingPrior(FittedPrior):
    """z = w_1 of dw/dt = v(w, t) from w_0 = u ~ N(0, I), with v fitted to E[z - u | w_t], w_t = (1 - t) u + t z."""

    name = "flow-matching"
    Settings = FlowMatchingSettings

    def __init__(self, latents: int, settings: FlowMatchingSettings | None = None) -> None:
        super().__init__(latents, settings)
        self.velocity = Velocity(latents, self.settings.flow_matching_width, self.settings.flow_matching_depth)

    @classmethod
    def check(cls, settings: FlowMatchingSettings) -> None:
        for name, most in (("steps", 10**9), ("batch", 10**6), ("width", 65_536), ("depth", 1000), ("heun", 10**6)):
            value = getattr(settings, f"flow_matching_{name}")
            if not 1 <= value <= most:
                raise UserError(f"--flow-matching-{name} must be from 1 to {most}, not {value}")
        if not 0 < settings.flow_matching_lr < math.inf:
            raise UserError(f"--flow-matching-lr must be a positive number, not {settings.flow_matching_lr}")

    def _fit(self, codes: Codes, seed: int, progress: Progress) -> dict[str, Any]:
        c, device = self.settings, codes.device
        self.velocity = seeded(
            lambda: Velocity(self.latents, c.flow_matching_width, c.flow_matching_depth), derive(seed, "velocity")
        ).to(device)
        rng = ops.make_rng(derive(seed, "flow matching"), device)

        def loss(z: Tensor) -> Tensor:
            noise = ops.philox_normal(rng, len(z), self.latents + 1)
            rng[1] += 1
            u = noise[:, :-1]
            # One time in each of B equal parts of [0,1]: less variance than B independent ones. The codes' order is
            # random, so that no code goes with a time.
            t = (torch.arange(len(z), device=device) + torch.special.ndtr(noise[:, -1])) / len(z)
            w = torch.lerp(u, z, t[:, None])
            wanted = (z - u - slope(t)[:, None] * w) * spread(t)[:, None]
            with autocast(device):
                found = self.velocity.residual(w, t)
            return F.mse_loss(found, wanted)

        train(
            self.velocity,
            loss,
            codes.batches(c.flow_matching_batch),
            steps=c.flow_matching_steps,
            lr=c.flow_matching_lr,
            decay=DECAY,
            progress=progress,
        )
        return {}

    def _sample(self, n: int, rng: Tensor) -> Tensor:
        noise = ops.philox_normal(rng, n, self.latents)
        return torch.cat([self._carried(part) for part in noise.split(CHUNK)] or [noise])

    def _carried(self, w: Tensor) -> Tensor:
        """w at t = 0 carried to t = 1."""
        steps = self.settings.flow_matching_heun
        times = torch.linspace(0, 1, steps + 1, device=w.device)[:, None].expand(-1, len(w))
        for t, later in pairwise(times):
            v = self.velocity(w, t)
            w = w + (v + self.velocity(w + v / steps, later)) / (2 * steps)
        return w

    def _log_prob(self, w: Tensor) -> Tensor:
        """log p(w) = log N(w_0; 0, I) - integral of div v dt, along the path back from w (Chen et al. 2018).

        The divergence of the network is estimated by e^T (dv/dw) e with random signs e, new ones at every step
        (Hutchinson): a value is right up to that noise, a mean over many w is unbiased.
        """
        rng = ops.make_rng(derive(0, "divergence"), w.device)
        return torch.cat([self._log_prob_of(part, rng) for part in w.split(CHUNK)])

    def _log_prob_of(self, w: Tensor, rng: Tensor) -> Tensor:
        steps = self.settings.flow_matching_heun
        times = torch.linspace(1, 0, steps + 1, device=w.device)[:, None].expand(-1, len(w))
        integral = torch.zeros(len(w), dtype=torch.float64, device=w.device)
        for t, earlier in pairwise(times):
            signs = ops.philox_normal(rng, len(w), self.latents).sign()
            rng[1] += 1
            v, divergence = self._velocity_and_divergence(w, t, signs)
            v2, divergence2 = self._velocity_and_divergence(w - v / steps, earlier, signs)
            w = w - (v + v2) / (2 * steps)
            integral += (divergence + divergence2).double() / (2 * steps)
        return standard_normal_log_prob(w) - integral

    @torch.enable_grad()
    def _velocity_and_divergence(self, w: Tensor, t: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach().requires_grad_()
        residual = self.velocity.residual(w, t) / spread(t)[:, None]
        (gradient,) = torch.autograd.grad(residual, w, signs)
        divergence = self.latents * slope(t) + (gradient * signs).sum(1)
        return (slope(t)[:, None] * w + residual).detach(), divergence
