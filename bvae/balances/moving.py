"""What the balances whose state follows the batches share: when it moves, and by which figures, of how many ranks."""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bvae import ops
from bvae.balances.base import DECAY, FLOOR, GaussianVAELoss, Loss
from bvae.balances.context import group_size, recomputing, transformed


class MovingLoss(GaussianVAELoss):
    """The base of the balances whose state follows the batches: when it moves, and from which figures.

    A training step uses the state from before it, as a constant, and then moves it by the batch's mse and KL. It does
    not move in eval mode or under torch.no_grad, and only once where activation checkpointing repeats the pass. With
    torch.distributed initialised, the figures are means over the ranks of `process_group`.

    Args:
        gamma: the decoder's standard deviation, which then stays; None follows the mse.
        start: gamma2 before the first batch, or "first-batch" for that batch's own mse.
        monotone: whether gamma2 never grows.
        accumulate: gather sums over several forward passes and move the state only in `step()`, to be called once per
            optimiser step.
        manual: gather nothing; the caller moves the state by `follow`, with figures of its own.
        process_group: the ranks that train one model together; None for all.

    State: buffers; the sums gathered so far, `sums`, are `pending` in state_dict.
    """

    pending: Tensor
    pending_sums: ClassVar[int] = 4
    """how many of the sums are saved: squares, elements, KL, samples"""

    def __init__(
        self,
        kl_weight: float | Literal["auto"],
        logits: bool,
        *,
        gamma: float | None = None,
        start: float | Literal["first-batch"] = 1.0,
        monotone: bool = True,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        limits = torch.finfo(torch.float32)
        if gamma is not None and not (gamma > 0 and limits.tiny <= gamma * gamma <= limits.max):
            raise ValueError(f"gamma must be a positive number whose square is a float32, not {gamma}")
        if start != "first-batch" and (isinstance(start, str) or not FLOOR <= float(start) < math.inf):
            raise ValueError(f"start must be 'first-batch' or a number of at least {FLOOR}, not {start!r}")
        # 0 stands for "not started": the op then takes the batch's own mse.
        first = gamma * gamma if gamma is not None else 0.0 if start == "first-batch" else float(start)
        super().__init__(first, kl_weight, logits)
        self.follows_mse = gamma is None
        self.monotone = monotone
        self.accumulate = accumulate
        self.manual = manual
        self.process_group = process_group
        # The live sums are no buffer: DistributedDataParallel overwrites buffers with rank 0's before each pass. The
        # buffer `pending` is their copy for state_dict.
        self.sums = torch.zeros(4, dtype=torch.float64)
        self._types["pending"] = torch.float64
        self.register_buffer("pending", torch.zeros(self.pending_sums, dtype=torch.float64))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.pending.zero_()
        self.sums.zero_()

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().state().items() if name != "pending"}

    def _unregistered(self) -> tuple[str, ...]:
        return (*super()._unregistered(), "sums")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._keep_types()
        with torch.no_grad():
            self.pending.copy_(self.sums[: self.pending_sums])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.sums.zero_()[: self.pending_sums] = self.pending

    def _place_sums(self) -> None:
        """Moves the sums to the state's device where a loader has moved that past `_apply`."""
        if self.sums.device != self.gamma2.device:
            self.sums = self.pending.new_zeros(4) if self.sums.is_meta else self.sums.to(self.gamma2.device)

    # ---- when it moves --------------------------------------------------------------------------------------------

    def _moves(self) -> bool:
        moves = self.training and torch.is_grad_enabled() and not recomputing()
        if moves and not self.manual and transformed():
            raise RuntimeError(
                f"{type(self).__name__} moves its state in training, which torch.func cannot follow: call eval() on "
                "the loss, and after each step loss.follow(mse, kl)"
            )
        return moves

    def _pooled(self, figures: Tensor) -> Tensor:
        """The mean over ranks of figures of this batch, in training; in evaluation the figures themselves."""
        if not (self.training and torch.is_grad_enabled()):
            return figures
        if self.pool is not None:
            return self.pool(figures)
        if self.manual or (size := group_size(self.process_group)) == 1:
            return figures
        pooled = figures.clone()
        dist.all_reduce(pooled, group=self.process_group)
        return pooled / size

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None) -> Loss:
        moves = self._moves() and not self.manual
        at_once = moves and not self.accumulate and group_size(self.process_group) == 1
        loss, sse = self._measure(recon, target, kl, kl_weight, weight, update=at_once and self.follows_mse)
        if at_once:
            if recon.numel():
                with torch.no_grad():
                    self._follow(loss.mse, loss.kl)
        elif moves:
            with torch.no_grad():
                counts = [torch.full_like(sse, n, dtype=torch.float64) for n in (recon.numel(), len(recon))]
                self._place_sums()
                self.sums.add_(torch.stack([sse.double(), counts[0], kl.sum().double(), counts[1]]))
            if not self.accumulate:
                self.step()
        return loss

    def _measure(
        self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None, update: bool
    ) -> tuple[Loss, Tensor]:
        """The loss and the sum of squares; with `update` gamma2 follows the mse."""
        return self._fused(recon, target, kl, kl_weight, weight, update, self.monotone)

    def _follow(self, mse: Tensor, kl: Tensor, some: Tensor | None = None) -> None:
        """Moves what a rule has beside the gamma2 that follows the mse; `some`: whether there was a batch at all."""

    def _good(self, mse: Tensor, kl: Tensor, some: Tensor | None) -> Tensor:
        """Whether the figures of a step are finite; those that are not are counted, unless gamma2's step does so."""
        good = (mse + kl).isfinite()
        if not self.follows_mse:
            self.skipped += ~good if some is None else ~good & some
        return good

    def _advance(self, sse: Tensor, elements: Tensor, kl: Tensor, samples: Tensor) -> None:
        if self.follows_mse:
            ops.update_gamma2(
                self.gamma2, self.skipped, sse, elements, decay=DECAY, floor=FLOOR, monotone=self.monotone
            )
        self._follow((sse / elements).float(), (kl / samples).float(), elements != 0)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the state once by all that was gathered since the last call; every rank must call it."""
        self._keep_types()
        self._place_sums()
        if group_size(self.process_group) > 1:
            dist.all_reduce(self.sums, group=self.process_group)
        self._advance(*self.sums.unbind())
        self.sums.zero_()

    @torch.no_grad()
    def follow(self, mse: Tensor, kl: Tensor) -> None:
        """In place of step(), and as it: moves the state once, by means that the caller has taken over all ranks.

        Args:
            mse: per element, a scalar on the device. kl: per sample, in nats, the same.
        """
        self._keep_types()
        one = torch.ones_like(mse, dtype=torch.float64)
        self._advance(mse.double(), one, kl.double(), one)
        self.sums.zero_()
