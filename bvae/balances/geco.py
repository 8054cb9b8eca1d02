"""GECO: the least KL at which the mse meets a target (Rezende & Viola 2018, arXiv 1810.00597)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.distributed as dist
from torch import Tensor

from bvae.balances.base import DECAY, FLOOR
from bvae.balances.moving import MovingLoss

FASTEST = 0.01  # the most that log gamma^2 moves in a step: the speed of the computed gamma
# How far gamma^2 may go from the target. At gamma^2 = target, sampling adds about k/D of it to the mse, at a hundredth
# nothing that counts; beyond, lambda would only have a longer way back.
RANGE = 100.0


class GecoLoss(MovingLoss):
    """KL + lambda (sse - target D), least over the network and greatest over lambda > 0; here gamma^2 = 1/(2 lambda).

    After each step, with m the running mean of the mse (.99 of the old, from the first batch's):

        log gamma^2 <- log gamma^2 - rate (m / target - 1)

    by at most .01, and gamma^2 between target/100 and 100 target (never below 1e-8). In the paper's terms, log lambda
    moves by eta (m - target) D with eta = rate / (target D). A target below the least mse that the network can reach
    sends lambda to its end.

    Args:
        kl_weight, logits: see GaussianVAELoss. accumulate, manual, process_group: see MovingLoss.
        target: the mse per element to reach.
        rate: the speed of log gamma^2 at an mse of twice the target.

    State: `gamma2`, from 1/2 (lambda 1) or the nearest that it may be, and `running_mse`, 0 before the first batch.
    """

    running_mse: Tensor

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        target: float,
        rate: float = 0.05,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 < target < math.inf:
            raise ValueError(f"target must be a positive number, not {target}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be a positive number, not {rate}")
        least, most = max(FLOOR, target / RANGE), max(FLOOR, target * RANGE)
        start = min(max(0.5, least), most)
        super().__init__(
            kl_weight, logits, start=start, accumulate=accumulate, manual=manual, process_group=process_group
        )
        self.least, self.most = least, most
        self.follows_mse = False  # but by the rule below
        self.target, self.rate = target, rate
        self._register("running_mse", 0.0)

    def _follow(self, mse: Tensor, kl: Tensor, some: Tensor | None = None) -> None:
        good = self._good(mse, kl, some)
        mean = (self.running_mse * DECAY + mse * (1 - DECAY)).where(self.running_mse != 0, mse)
        change = (self.rate * (mean / self.target - 1)).clamp(-FASTEST, FASTEST)
        gamma2 = (self.gamma2 * (-change).exp()).clamp(self.least, self.most)
        self.running_mse.copy_(mean.where(good, self.running_mse))
        self.gamma2.copy_(gamma2.where(good, self.gamma2))

    def extras(self) -> dict[str, Tensor]:
        return {"geco_lambda": 0.5 / self.gamma2, "geco_mse": self.running_mse}


@dataclass(frozen=True)
class GecoSettings:
    """Settings of --balance geco."""

    geco_target: float = 0.01
    """The mean squared error per element to reach."""
    geco_rate: float = 0.05
    """Change of log gamma^2 a step where the error is twice the target."""

    arguments: ClassVar[dict[str, str]] = {"geco_target": "target", "geco_rate": "rate"}
