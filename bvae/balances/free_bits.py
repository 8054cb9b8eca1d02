"""Free bits: each latent may carry some nats for nothing (Kingma et al., NIPS 2016)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bvae.balances.base import Loss
from bvae.balances.moving import MovingLoss


class FreeBitsLoss(MovingLoss):
    """The KL of a latent counts only above `bits`: sum_j max(bits, mean over the batch of KL_j) takes its place.

    A latent below gets no gradient of the KL. The mean is over the batch of all ranks, which exchange it between
    forward and backward; `Loss.kl` stays the unclipped KL.

    Args:
        kl_weight, logits: see GaussianVAELoss. gamma, manual, process_group: see MovingLoss.
        bits: nats per latent, lambda in the paper.
        monotone: whether gamma^2, which follows the mse where no `gamma` is given, never grows.
        accumulate: refused; the mean of a latent over a batch cannot be known from a part of it.

    State: `clipped_kl`, the sum above in the last training step, and `clipped`, the part of the latents below.
    """

    per_latent = True
    clipped_kl: Tensor
    clipped: Tensor

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        bits: float = 0.1,
        gamma: float | None = None,
        monotone: bool = True,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if accumulate:
            raise ValueError("accumulate is not possible: free bits clip the mean of the whole batch, in its own loss")
        if not 0 <= bits < math.inf:
            raise ValueError(f"bits must be a number of at least 0, not {bits}")
        super().__init__(kl_weight, logits, gamma=gamma, monotone=monotone, manual=manual, process_group=process_group)
        self.bits = bits
        self._register("clipped_kl", 0.0)
        self._register("clipped", 0.0)

    def _measure(
        self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None, update: bool
    ) -> tuple[Loss, Tensor]:
        samples = max(len(recon), 1)
        means = self._pooled_means(kl, samples)
        above = means > self.bits
        counted = torch.where(above, kl, self.bits * samples).sum()
        if self._moves():
            with torch.no_grad():
                self.clipped_kl.copy_(torch.where(above, means, self.bits).sum())
                self.clipped.copy_((~above).sum() / max(len(means), 1))
        loss, sse = self._fused(recon, target, counted, kl_weight, weight, update, self.monotone)
        raw = (kl.detach().sum() / samples).float()
        return Loss(loss.loss, loss.nll, raw, loss.mse, loss.gamma2, loss.weight), sse

    def _pooled_means(self, kl: Tensor, samples: int) -> Tensor:
        sums = kl.detach()
        whole = self._pooled(torch.cat([sums, torch.full_like(sums[:1], samples)]))
        return whole[:-1] / whole[-1]

    def extras(self) -> dict[str, Tensor]:
        return {"clipped_kl": self.clipped_kl, "clipped_latents": self.clipped}


@dataclass(frozen=True)
class FreeBitsSettings:
    """Settings of --balance free-bits."""

    free_bits: float = 0.1
    """Nats that each latent may carry for nothing."""

    arguments: ClassVar[dict[str, str]] = {"free_bits": "bits"}
