"""A normalising flow over whitened latents: neural spline coupling layers (Durkan et al. 2019), by the library zuko."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.errors import UserError
from bvae.models.priors.base import CHUNK, Codes, FittedPrior, Progress
from bvae.models.priors.training import seeded, train
from bvae.seeds import derive

DECAY = 0.999  # decay of the moving average of the weights


@dataclass(frozen=True)
class FlowSettings:
    """Settings of the prior `flow`."""

    flow_steps: int = 10_000
    """Training steps."""
    flow_batch: int = 512
    """Codes per training step."""
    flow_layers: int = 8
    """Coupling layers; each transforms one half of the latents, given the other half."""
    flow_bins: int = 8
    """Bins of a layer's splines."""
    flow_width: int = 256
    """Width of the two hidden layers of the network that gives a layer's splines."""
    flow_lr: float = 5e-4
    """Adam's highest learning rate."""


class FlowPrior(FittedPrior):
    """log p(w) = log N(f(w); 0, I) + log |det df/dw|, sampled as f^-1(u), one pass through each coupling layer.

    Splines act on [-5, 5]; outside it, where whitened latents are rare, f is the identity.
    """

    name = "flow"
    Settings = FlowSettings

    def __init__(self, latents: int, settings: FlowSettings | None = None) -> None:
        super().__init__(latents, settings)
        self.flow = _build(latents, self.settings)

    @classmethod
    def check(cls, settings: FlowSettings) -> None:
        for name, most in (("steps", 10**9), ("batch", 10**6), ("layers", 1000), ("bins", 1024), ("width", 65_536)):
            value = getattr(settings, f"flow_{name}")
            if not 1 <= value <= most:
                raise UserError(f"--flow-{name} must be from 1 to {most}, not {value}")
        if not 0 < settings.flow_lr < math.inf:
            raise UserError(f"--flow-lr must be a positive number, not {settings.flow_lr}")
        if importlib.util.find_spec("zuko") is None:
            raise UserError("the prior flow needs zuko, which is not installed: pip install 'bvae[flow]'")

    def _fit(self, codes: Codes, seed: int, progress: Progress) -> dict[str, Any]:
        c = self.settings
        self.flow = seeded(lambda: _build(self.latents, c), derive(seed, "flow")).to(codes.device)
        train(
            self.flow,
            lambda w: -self.flow().log_prob(w).mean(),
            codes.batches(c.flow_batch),
            steps=c.flow_steps,
            lr=c.flow_lr,
            decay=DECAY,
            progress=progress,
        )
        return {}

    def _sample(self, n: int, rng: Tensor) -> Tensor:
        inverse = self.flow().transform.inv
        noise = ops.philox_normal(rng, n, self.latents)
        return torch.cat([inverse(part) for part in noise.split(CHUNK)] or [noise])

    def _log_prob(self, w: Tensor) -> Tensor:
        return torch.cat([self.flow().log_prob(part).double() for part in w.split(CHUNK)])


def _build(latents: int, c: FlowSettings) -> nn.Module:
    import zuko

    return zuko.flows.NICE(
        latents,
        transforms=c.flow_layers,
        randmask=True,
        univariate=zuko.transforms.MonotonicRQSTransform,
        shapes=[(c.flow_bins,), (c.flow_bins,), (c.flow_bins - 1,)],
        hidden_features=(c.flow_width, c.flow_width),
        activation=nn.SiLU,
    )
