"""gamma computed from the running mse (Asperti & Trentin 2020), fixed, or learned (Dai & Wipf 2019)."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bvae import reference
from bvae.balances.base import FLOOR, GaussianVAELoss, Loss
from bvae.balances.moving import MovingLoss

SMALL_BATCH = 32  # from here on the minimum of the paper's rule is within about 6 % of the mean


class BalancedLoss(MovingLoss):
    """The paper's loss: gamma2 is the running mse, which never grows (Asperti & Trentin 2020, section III).

    A training step uses the gamma2 from before it, as a constant, and then moves it:

        gamma2 <- max(1e-8, min(gamma2, 0.99 gamma2 + 0.01 mse_batch)),   from gamma2 = 1

    A batch whose mse is not finite leaves gamma2 as it was and is counted in `skipped`. gamma2 is not moved in eval
    mode or under torch.no_grad. With torch.distributed initialised, the mse is averaged over the ranks first.

    The rule is made for images in [0,1] and batches of about 100. `start="first-batch"` is for values of another scale,
    whose mse may stay above 1. `monotone=False` leaves out the minimum, which is biased downwards where the mse differs
    much from batch to batch: for batches of fewer than 32, and for an mse that may rise.

    Args:
        kl_weight, logits: see GaussianVAELoss.
        accumulate: gather sums over several forward passes and move gamma2 only in `step()`, to be called once per
            optimiser step: gradient accumulation then gives the gamma2 of the undivided batch.
        start: gamma2 before the first batch; "first-batch": that batch's own mse (with several ranks, its first loss
            uses each rank's own).
        monotone: whether gamma2 never grows.
        manual: move gamma2 in `follow` only.
        process_group: the ranks that train this model together; None for all of the job.

    State: `gamma2` and `skipped` (and the pending sums): in state_dict, moved by `.to()`, float32 whatever the model.
    """

    pending_sums = 2

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        accumulate: bool = False,
        start: float | Literal["first-batch"] = 1.0,
        monotone: bool = True,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            kl_weight,
            logits,
            start=start,
            monotone=monotone,
            accumulate=accumulate,
            manual=manual,
            process_group=process_group,
        )
        self._warned = False

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None) -> Loss:
        small = 0 < len(recon) < SMALL_BATCH and self.monotone and not (self.accumulate or self.manual or self._warned)
        if small and not torch.compiler.is_compiling() and self._moves():
            self._warned = True
            warnings.warn(
                f"With batches of {len(recon)}, fewer than {SMALL_BATCH}, a gamma2 that never grows ends well below "
                "the mse: give BalancedLoss(monotone=False), or accumulate=True where an optimiser step has several",
                stacklevel=5,
            )
        return super()._loss(recon, target, kl, kl_weight, weight)


@dataclass(frozen=True)
class ComputedSettings:
    """Settings of --balance computed."""

    gamma_start: float | Literal["first-batch"] = 1.0
    """gamma^2 before the first batch; `first-batch` takes that batch's mse."""
    gamma_monotone: bool = True
    """Whether the computed gamma never grows, as in the paper; without it, it follows the mean error at any batch."""

    arguments: ClassVar[dict[str, str]] = {"gamma_start": "start", "gamma_monotone": "monotone"}


class FixedGammaLoss(GaussianVAELoss):
    """The same loss with a gamma that stays: give `gamma`, the decoder's standard deviation, or `beta`.

    `beta` weighs the KL against sse/2 (a beta-VAE with a unit-variance Gaussian decoder): up to a factor of the whole
    loss that is gamma^2 = beta.
    """

    def __init__(
        self,
        gamma: float | None = None,
        beta: float | None = None,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
    ) -> None:
        if (gamma is None) == (beta is None):
            raise ValueError("give exactly one of gamma and beta")
        given = float(gamma if gamma is not None else beta)  # type: ignore[arg-type]
        gamma2 = given * given if gamma is not None else given
        limits = torch.finfo(torch.float32)
        if not (given > 0 and limits.tiny <= gamma2 <= limits.max):
            raise ValueError(f"gamma and beta must be positive and gamma^2 a float32, not {given}")
        super().__init__(gamma2, kl_weight, logits)

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None) -> Loss:
        return self._fused(recon, target, kl, kl_weight, weight)[0]


class LearnedGammaLoss(GaussianVAELoss):
    """Dai & Wipf (2019): log gamma is a trained scalar from 0. Give `parameters()` of this module to the optimiser.

    In training log gamma is put back to gamma^2 = 1e-8 where the optimiser went below: on data that can be reproduced
    exactly it would otherwise fall for ever.
    """

    LOWEST = 0.5 * math.log(FLOOR)

    def __init__(self, kl_weight: float | Literal["auto"] = 1.0, logits: bool = True) -> None:
        super().__init__(1.0, kl_weight, logits)  # gamma2 = 1 makes the fused op's sse the plain one
        self.log_gamma = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.log_gamma.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.log_gamma.data
        super()._apply(fn, recurse)
        if self.log_gamma.dtype != kept.dtype:  # as for gamma2: moved, not rounded
            self.log_gamma.data = kept.to(self.log_gamma.device)
        return self

    def _keep_types(self) -> None:
        super()._keep_types()
        if self.log_gamma.dtype != torch.float32:
            self.log_gamma.data = self.log_gamma.data.float()

    def current_gamma2(self) -> Tensor:
        self._keep_types()
        return torch.exp(2 * self.log_gamma.detach().clamp(min=self.LOWEST))

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None) -> Loss:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.log_gamma.clamp_(min=self.LOWEST)
        parts, sse = self._fused(recon, target, kl, kl_weight, weight)
        gamma2 = torch.exp(2 * self.log_gamma)
        nll = reference.gaussian_nll(sse, gamma2, len(recon), math.prod(recon.shape[1:]))
        loss = nll + parts.weight * kl / max(len(recon), 1)
        return Loss(loss, nll.detach(), parts.kl, parts.mse, gamma2.detach(), parts.weight)
