"""Controlled capacity: the KL is held at a target that rises (Burgess et al. 2018, arXiv 1804.03599)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.balances.base import Loss
from bvae.balances.moving import MovingLoss


class CapacityLoss(MovingLoss):
    """strength |KL - C(t)| takes the place of the KL; C rises linearly to `most` over a part of the run, then stays.

        loss = sse/(2 gamma^2) + kl_weight strength |mean KL - C(t)| + D/2 log(2 pi gamma^2)
        C(t) = most min(1, t/(part T))

    The absolute value is of the batch's mean, over all ranks, which exchange it between forward and backward.
    `Loss.weight` has the sign of KL - C(t).

    Args:
        kl_weight, logits: see GaussianVAELoss. manual, process_group: see MovingLoss.
        total_steps: optimiser steps of the whole run, T.
        most: the last C, in nats.
        strength: gamma in the paper.
        part: the part of the run in which C rises.
        gamma: the decoder's standard deviation; by default gamma^2 = 1/2, so that the first term is the plain sse.
        accumulate: refused; the sign of the whole batch cannot be known from a part of it.

    State: `steps`, those finished, and `capacity`, C of the next one.
    """

    timed = True
    steps: Tensor
    capacity: Tensor

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        total_steps: int,
        most: float = 25.0,
        strength: float = 100.0,
        part: float = 0.5,
        gamma: float = math.sqrt(0.5),
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if accumulate:
            raise ValueError("accumulate is not possible: the KL of the whole batch decides on its own gradient's sign")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps}")
        if not 0 <= most < math.inf:
            raise ValueError(f"most must be a number of at least 0, not {most}")
        if not 0 < strength < math.inf:
            raise ValueError(f"strength must be a positive number, not {strength}")
        if not 0 < part <= 1:
            raise ValueError(f"part must be above 0 and at most 1, not {part}")
        super().__init__(kl_weight, logits, gamma=gamma, manual=manual, process_group=process_group)
        self.total_steps, self.most, self.strength, self.part = total_steps, most, strength, part
        self._register("steps", 0, torch.int64)
        self._register("capacity", 0.0)

    def _measure(
        self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None, update: bool
    ) -> tuple[Loss, Tensor]:
        samples = max(len(recon), 1)
        whole = self._pooled(torch.stack([kl.detach().reshape(()), torch.full_like(kl.detach().reshape(()), samples)]))
        sign = torch.sign(whole[0] / whole[1] - self.capacity).float()
        # sign (KL - C) is |KL - C|; over ranks, too, in the mean.
        beyond = kl.reshape(()) - samples * self.capacity
        factors = self._times(sign, self.strength * kl_weight, weight)
        loss, sse = self._fused(recon, target, beyond, *factors)
        raw = (kl.detach().reshape(()) / samples).float()
        return Loss(loss.loss, loss.nll, raw, loss.mse, loss.gamma2, loss.weight), sse

    def _follow(self, mse: Tensor, kl: Tensor, some: Tensor | None = None) -> None:
        self.steps += self._good(mse, kl, some)
        self.capacity.copy_(self.most * (self.steps.double() / (self.part * self.total_steps)).clamp(max=1))

    def extras(self) -> dict[str, Tensor]:
        return {"capacity": self.capacity}


@dataclass(frozen=True)
class CapacitySettings:
    """Settings of --balance capacity."""

    capacity_kl: float = 25.0
    """The KL to rise to, in nats."""
    capacity_strength: float = 100.0
    """Weight of the KL's distance from it."""
    capacity_part: float = 0.5
    """The part of the run in which it rises."""

    arguments: ClassVar[dict[str, str]] = {
        "capacity_kl": "most",
        "capacity_strength": "strength",
        "capacity_part": "part",
    }
