"""KL annealing: its weight rises from 0 to 1 (Bowman et al. 2016), or does so several times (Fu et al. 2019)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.balances.moving import MovingLoss

Shape = Literal["linear", "logistic", "cyclical"]


def annealed_weight(shape: Shape, step: Tensor, total_steps: int, part: float, cycles: int) -> Tensor:
    """The weight of the KL after `step` finished steps, float64, with T = total_steps:

    linear    min(1, t / (part T))                                          Bowman et al., CoNLL 2016
    logistic  1 / (1 + exp(6 - 12 t / (part T))): 1/2 at half of the part   the same
    cyclical  min(1, (t mod P) / (part P)), P = ceil(T / cycles)            Fu et al., NAACL 2019

    From t = T on it is 1.
    """
    t = step.double()
    if shape == "linear":
        weight = t / (part * total_steps)
    elif shape == "logistic":
        weight = torch.sigmoid(12 * t / (part * total_steps) - 6)
    else:
        period = math.ceil(total_steps / cycles)
        weight = t.remainder(period) / (part * period)
    return weight.clamp(max=1).masked_fill(t >= total_steps, 1.0)


class AnnealedLoss(MovingLoss):
    """The weight of the KL rises with the steps, by `annealed_weight`; it multiplies kl_weight.

    gamma^2 follows the mse and may grow again: it falls far while the KL weighs little, and a gamma that never grows
    would stay there. Or give `gamma`, which then stays.

    Args:
        kl_weight, logits: see GaussianVAELoss. gamma, accumulate, manual, process_group: see MovingLoss.
        total_steps: optimiser steps of the whole run.
        shape: "linear", "logistic" or "cyclical".
        part: the part of the run (of each cycle) in which the weight rises.
        cycles: number of cycles of "cyclical".

    State: `steps`, those finished, and `weight`, of the next one.
    """

    timed = True
    steps: Tensor
    weight: Tensor

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        total_steps: int,
        shape: Shape = "linear",
        part: float = 0.5,
        cycles: int = 4,
        gamma: float | None = None,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps}")
        if shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {', '.join(get_args(Shape))}, not {shape!r}")
        if not 0 < part <= 1:
            raise ValueError(f"part must be above 0 and at most 1, not {part}")
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, not {cycles}")
        super().__init__(
            kl_weight,
            logits,
            gamma=gamma,
            monotone=False,
            accumulate=accumulate,
            manual=manual,
            process_group=process_group,
        )
        self.total_steps, self.shape, self.part, self.cycles = total_steps, shape, part, cycles
        self._register("steps", 0, torch.int64)
        self._register("weight", self._weight_after(torch.zeros((), device="cpu")).item())

    def _weight_after(self, steps: Tensor) -> Tensor:
        return annealed_weight(self.shape, steps, self.total_steps, self.part, self.cycles)

    def _weight(self, recon: Tensor, latents: int | None) -> tuple[float, Tensor | None]:
        return self._times(self.weight, *super()._weight(recon, latents))

    def _follow(self, mse: Tensor, kl: Tensor, some: Tensor | None = None) -> None:
        self.steps += self._good(mse, kl, some)
        self.weight.copy_(self._weight_after(self.steps))

    def extras(self) -> dict[str, Tensor]:
        return {"annealed_weight": self.weight}


@dataclass(frozen=True)
class AnnealedSettings:
    """Settings of --balance annealed."""

    anneal: Shape = "linear"
    """How the weight of the KL rises from 0 to 1: linear, logistic, or cyclical (several times from 0)."""
    anneal_part: float = 0.5
    """The part of the run, or of each cycle, in which it rises."""
    anneal_cycles: int = 4
    """Cycles of --anneal cyclical."""

    arguments: ClassVar[dict[str, str]] = {"anneal": "shape", "anneal_part": "part", "anneal_cycles": "cycles"}
