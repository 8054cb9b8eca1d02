"""ControlVAE: a PI controller moves the weight of the KL until the KL is at a set-point (Shao et al., ICML 2020)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.balances.moving import MovingLoss


class ControlVAELoss(MovingLoss):
    """The weight of the KL, in [0,1], is the output of a controller; it multiplies kl_weight. After each step:

        e = set_point - KL,   P = kp / (1 + exp(e)),   I <- I - ki e,   weight = clip(P + I, 0, 1)

    I stays while P + I is outside of [0,1] and e would drive it further out.

    Args:
        kl_weight, logits: see GaussianVAELoss. accumulate, manual, process_group: see MovingLoss.
        set_point: the KL to hold, in nats per sample.
        kp, ki: gains, positive; -ki is Ki of the paper.
        gamma: the decoder's standard deviation; by default gamma^2 = 1/2, so that the first term is the plain sse.

    State: `integral`, I; `output`, P + I; `weight`, of the next step, from 0.
    """

    integral: Tensor
    output: Tensor
    weight: Tensor

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        set_point: float,
        kp: float = 0.01,
        ki: float = 0.0001,
        gamma: float = math.sqrt(0.5),
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value in (("set_point", set_point), ("kp", kp), ("ki", ki)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value}")
        super().__init__(
            kl_weight, logits, gamma=gamma, accumulate=accumulate, manual=manual, process_group=process_group
        )
        self.set_point, self.kp, self.ki = set_point, kp, ki
        for name in ("integral", "output", "weight"):
            self._register(name, 0.0)

    def _weight(self, recon: Tensor, latents: int | None) -> tuple[float, Tensor | None]:
        return self._times(self.weight, *super()._weight(recon, latents))

    def _follow(self, mse: Tensor, kl: Tensor, some: Tensor | None = None) -> None:
        good = self._good(mse, kl, some)
        error = self.set_point - kl
        out = ((self.output < 0) & (error > 0)) | ((self.output > 1) & (error < 0))
        integral = self.integral - (self.ki * error).masked_fill(out, 0.0)
        output = self.kp * torch.sigmoid(-error) + integral
        self.integral.copy_(integral.where(good, self.integral))
        self.output.copy_(output.where(good, self.output))
        self.weight.copy_(self.output.clamp(0, 1))

    def extras(self) -> dict[str, Tensor]:
        return {"controlvae_weight": self.weight, "controlvae_integral": self.integral}


@dataclass(frozen=True)
class ControlVAESettings:
    """Settings of --balance controlvae."""

    controlvae_kl: float = 25.0
    """The KL to hold, in nats per image."""
    controlvae_kp: float = 0.01
    """Gain of the controller's proportional term."""
    controlvae_ki: float = 0.0001
    """Gain of its integral term, per step and nat."""

    arguments: ClassVar[dict[str, str]] = {
        "controlvae_kl": "set_point",
        "controlvae_kp": "kp",
        "controlvae_ki": "ki",
    }
