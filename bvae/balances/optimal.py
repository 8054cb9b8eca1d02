"""sigma-VAE: gamma^2 is the mse of the very batch, or of the very image (Rybkin, Daniilidis, Levine, ICML 2021)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bvae import reference
from bvae.balances.base import FLOOR, Loss
from bvae.balances.moving import MovingLoss


class OptimalGammaLoss(MovingLoss):
    """gamma^2 = mse of the batch itself, the maximum-likelihood value: the loss is D/2 log mse + KL up to a constant.

        loss = D/2 (1 + log(2 pi mse)) + kl_weight KL

    Its gradient in the network is that of sse/(2 gamma^2) with gamma^2 held constant, so gamma^2 carries none. With
    `per_image` every image has its own, mse_i (the beta-sigma-VAE where kl_weight is beta). No gamma^2 is below 1e-8.

    With torch.distributed the mse is that of the whole batch: ranks exchange it between forward and backward.

    Args:
        kl_weight, logits: see GaussianVAELoss. manual, process_group: see MovingLoss.
        per_image: one gamma^2 an image. This loss is not fused.
        accumulate: only with `per_image`; the mse of a batch cannot be known from a part of it.

    State: `gamma2`, the running mean of the batches' mse (.99 of the old, from the first batch), which evaluation uses.
    """

    def __init__(
        self,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        *,
        per_image: bool = False,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if accumulate and not per_image:
            raise ValueError(
                "accumulate needs per_image: the optimal gamma is that of the whole batch, in its own loss"
            )
        super().__init__(
            kl_weight,
            logits,
            start="first-batch",
            monotone=False,
            accumulate=accumulate,
            manual=manual,
            process_group=process_group,
        )
        self.per_image = per_image

    def _measure(
        self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None, update: bool
    ) -> tuple[Loss, Tensor]:
        if not self.training:  # evaluation has one gamma^2 for all images, as a likelihood must
            return self._fused(recon, target, kl, kl_weight, weight)
        samples, elements = len(recon), math.prod(recon.shape[1:])
        # The op's loss is not used, but its sum of squares; gamma2 moves as if it were.
        parts, sse = self._fused(recon, target, kl, kl_weight, weight, update, monotone=False)
        if self.per_image:
            x = reference.unit_target(target, sse.dtype)
            x_hat = recon.to(sse.dtype).sigmoid() if self.logits else recon.to(sse.dtype)
            squares = (x_hat - x).square().reshape(samples, elements).sum(1)
            gamma2 = (squares.detach() / max(elements, 1)).clamp(min=FLOOR)
            nll = reference.gaussian_nll(squares, gamma2, 1, elements).sum() / max(samples, 1)
            used = gamma2.mean().float() if samples else parts.gamma2
        else:
            count = torch.full_like(sse, recon.numel()).detach()
            whole = self._pooled(torch.stack([sse.detach(), count]))
            gamma2 = (whole[0] / whole[1].clamp(min=1)).clamp(min=FLOOR)
            nll = reference.gaussian_nll(sse, gamma2, samples, elements)
            used = gamma2.float()
        loss = nll + parts.weight * kl / max(samples, 1)
        return Loss(loss, nll.detach().float(), parts.kl, parts.mse, used, parts.weight), sse


@dataclass(frozen=True)
class OptimalSettings:
    """Settings of --balance optimal."""

    optimal_per_image: bool = False
    """One gamma^2 an image, its own mean squared error, in place of the batch's."""

    arguments: ClassVar[dict[str, str]] = {"optimal_per_image": "per_image"}
