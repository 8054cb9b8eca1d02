"""The losses: a Gaussian VAE's negative ELBO with gamma computed (Asperti & Trentin 2020), learned or fixed.

All three are modules with one interface, so that swapping the balance changes one name. Nothing in them reads the
device: every result stays where the tensors are.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bvae import ops, reference
from bvae.config.registry import Part
from bvae.errors import UserError

if TYPE_CHECKING:
    from bvae.config import Config

DECAY = 0.99  # weight of the old gamma2 in the running estimate, the authors' code
FLOOR = 1e-8  # ours: keeps 1/gamma2 finite when the reconstruction becomes exact


class Loss(NamedTuple):
    """The loss and its parts, scalars on the device; only `loss` carries a gradient."""

    loss: Tensor
    """mean over the batch of sse/(2 gamma2) + kl_weight*KL + D log gamma + D/2 log 2 pi"""
    nll: Tensor
    """the same without the KL: the Gaussian negative log-likelihood per sample, in nats"""
    kl: Tensor
    """KL per sample, in nats, unweighted"""
    mse: Tensor
    """mean squared error per element of the batch"""
    gamma2: Tensor
    """the gamma^2 that this loss used"""


class GaussianVAELoss(nn.Module):
    """What the three balances share: arguments, the KL and its weight, gamma2 as state. Use one of the subclasses.

    State: `gamma2`, float32 whatever the model is cast to, and `skipped`, the number of batches it did not follow.

    Args:
        kl_weight: weight of the KL, or "auto" for (2*side/k)^2, defined for square images [B,C,side,side].
        logits: whether the reconstruction is logits of an image in [0,1] (the sigmoid is then fused into the loss).
    """

    gamma2: Tensor
    skipped: Tensor

    def __init__(self, gamma2: float, kl_weight: float | Literal["auto"], logits: bool) -> None:
        super().__init__()
        if kl_weight != "auto" and (isinstance(kl_weight, str) or not 0 <= float(kl_weight) < math.inf):
            raise ValueError(f"kl_weight must be 'auto' or a number of at least 0, not {kl_weight!r}")
        self.kl_weight = kl_weight
        self.logits = logits
        self.register_buffer("gamma2", torch.tensor(gamma2, dtype=torch.float32))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():  # .half() and .bfloat16() move the state but do not round it
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor | None = None,
        log_sigma: Tensor | None = None,
        *,
        logvar: Tensor | None = None,
        kl: Tensor | None = None,
        latents: int | None = None,
    ) -> Loss:
        """Computes the loss of a batch.

        Args:
            recon: reconstruction [B,...], logits or values, any floating type.
            target: what it should be, same shape: floats, or uint8 that stands for value/255.
            mu: posterior means [B,...].
            log_sigma: log of the posterior's standard deviations, same shape; or give `logvar`, the log variances.
            kl: instead of mu and log_sigma, the KL already summed over the batch (ops.sample_kl gives it).
            latents: number of latents per sample; only kl_weight "auto" with `kl` needs it.

        Raises:
            ValueError: shapes that do not match, dtypes that cannot be, or arguments missing or given twice.
        """
        if not recon.is_floating_point():
            raise ValueError(f"recon must be of a floating type, not {recon.dtype}")
        if not (target.is_floating_point() or target.dtype == torch.uint8):
            raise ValueError(f"target must be floats in the data's range, or uint8 for value/255, not {target.dtype}")
        if recon.shape != target.shape:
            raise ValueError(f"recon {tuple(recon.shape)} and target {tuple(target.shape)} differ in shape")
        if recon.ndim < 1:
            raise ValueError("recon must have a batch dimension")
        if kl is None:
            kl, latents = self._kl(recon, mu, log_sigma, logvar)
        elif mu is not None or log_sigma is not None or logvar is not None:
            raise ValueError("give either kl or the posterior (mu with log_sigma or logvar), not both")
        elif kl.numel() != 1:
            raise ValueError(f"kl must be one number, the sum over the batch, not {tuple(kl.shape)}: give kl.sum()")
        return self._loss(recon, target, kl, self._weight(recon, latents))

    def _kl(
        self, recon: Tensor, mu: Tensor | None, log_sigma: Tensor | None, logvar: Tensor | None
    ) -> tuple[Tensor, int]:
        if mu is None or (log_sigma is None) == (logvar is None):
            raise ValueError("give mu and one of log_sigma and logvar (or kl alone)")
        if log_sigma is None:
            assert logvar is not None
            log_sigma = 0.5 * logvar
        if mu.shape != log_sigma.shape:
            raise ValueError(f"mu {tuple(mu.shape)} and log_sigma {tuple(log_sigma.shape)} differ in shape")
        if mu.shape[:1] != recon.shape[:1]:
            raise ValueError(f"mu has {mu.shape[0] if mu.ndim else 0} samples, recon {recon.shape[0]}")
        # The KL in fp32 at least: in bf16 the terms of a sharp latent cancel to noise.
        wide = torch.promote_types(mu.dtype, torch.float32)
        return reference.kl(mu.to(wide), log_sigma.to(wide)).sum(), math.prod(mu.shape[1:])

    def _weight(self, recon: Tensor, latents: int | None) -> float:
        if self.kl_weight != "auto":
            return float(self.kl_weight)
        if recon.ndim != 4 or recon.shape[2] != recon.shape[3]:
            raise ValueError(f"kl_weight 'auto' needs square images [B,C,side,side], not {tuple(recon.shape)}")
        if not latents:
            raise ValueError("kl_weight 'auto' needs the number of latents: give mu, or latents beside kl")
        return reference.auto_kl_weight(recon.shape[2], latents)

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float) -> Loss:
        raise NotImplementedError

    def _fused(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, update: bool) -> tuple[Loss, Tensor]:
        out = ops.balanced_loss(
            recon,
            target,
            kl,
            self.gamma2,
            self.skipped,
            kl_weight=kl_weight,
            logits=self.logits,
            update=update,
            decay=DECAY,
            floor=FLOOR,
        )
        mse, kl_mean, gamma2, nll = out.stats.unbind()
        return Loss(out.loss, nll, kl_mean, mse, gamma2), out.sse

    def current_gamma2(self) -> Tensor:
        """The gamma^2 that the next loss will use, a scalar on the device."""
        return self.gamma2

    def follow(self, mse: Tensor) -> None:
        """Ends a training step whose mse, over all its parts, the caller has found; nothing here depends on it."""

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}, logits={self.logits}"


class BalancedLoss(GaussianVAELoss):
    """The paper's loss: gamma2 is the running mse, which never grows (Asperti & Trentin 2020, section III).

    A training step uses the gamma2 from before it, as a constant, and then moves it:

        gamma2 <- max(1e-8, min(gamma2, 0.99 gamma2 + 0.01 mse_batch)),   from gamma2 = 1

    A batch whose mse is not finite leaves gamma2 as it was and is counted in `skipped`. gamma2 is not moved in eval
    mode or under torch.no_grad. With torch.distributed initialised, the mse is averaged over all ranks first.

    Args:
        kl_weight, logits: see GaussianVAELoss.
        accumulate: gather sums over several forward passes and move gamma2 only in `step()`, to be called once per
            optimiser step: gradient accumulation then gives the gamma2 of the undivided batch.

    State: `gamma2` and `skipped` (and the pending sums) are buffers: in state_dict, moved by `.to()`.
    """

    pending: Tensor

    def __init__(
        self, kl_weight: float | Literal["auto"] = 1.0, logits: bool = True, *, accumulate: bool = False
    ) -> None:
        super().__init__(1.0, kl_weight, logits)
        self.accumulate = accumulate
        self.register_buffer("pending", torch.zeros(2, dtype=torch.float64))  # sse and number of elements

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float) -> Loss:
        training = self.training and torch.is_grad_enabled()
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        loss, sse = self._fused(recon, target, kl, kl_weight, update=training and alone and not self.accumulate)
        if training and (self.accumulate or not alone):
            with torch.no_grad():
                self.pending += torch.stack([sse.double(), torch.full_like(sse, recon.numel(), dtype=torch.float64)])
            if not self.accumulate:
                self.step()
        return loss

    @torch.no_grad()
    def step(self) -> None:
        """Moves gamma2 once from everything gathered since the last call, on all ranks (which must all call it)."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.pending)
        sse, count = self.pending.unbind()
        ops.update_gamma2(self.gamma2, self.skipped, sse, count, decay=DECAY, floor=FLOOR)
        self.pending.zero_()

    @torch.no_grad()
    def follow(self, mse: Tensor) -> None:
        """In place of step(), and as it: moves gamma2 once, by an mse that the caller has pooled over all ranks."""
        ops.update_gamma2(
            self.gamma2, self.skipped, mse, torch.ones_like(mse, dtype=torch.float64), decay=DECAY, floor=FLOOR
        )
        self.pending.zero_()


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

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float) -> Loss:
        return self._fused(recon, target, kl, kl_weight, update=False)[0]


class LearnedGammaLoss(GaussianVAELoss):
    """Dai & Wipf (2019): log gamma is a trained scalar from 0. Give `parameters()` of this module to the optimiser."""

    def __init__(self, kl_weight: float | Literal["auto"] = 1.0, logits: bool = True) -> None:
        super().__init__(1.0, kl_weight, logits)  # gamma2 = 1 makes the fused op's sse the plain one
        self.log_gamma = nn.Parameter(torch.zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.log_gamma.data
        super()._apply(fn, recurse)
        if self.log_gamma.dtype != kept.dtype:  # as for gamma2: moved, not rounded
            self.log_gamma.data = kept.to(self.log_gamma.device)
        return self

    def current_gamma2(self) -> Tensor:
        return torch.exp(2 * self.log_gamma.detach())

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float) -> Loss:
        parts, sse = self._fused(recon, target, kl, kl_weight, update=False)
        samples = max(recon.shape[0], 1)
        gamma2 = torch.exp(2 * self.log_gamma)
        nll = reference.gaussian_nll(sse, gamma2, recon.shape[0], math.prod(recon.shape[1:]))
        loss = nll + kl_weight * kl / samples
        return Loss(loss, nll.detach(), parts.kl, parts.mse, gamma2.detach())


def make_loss(
    balance: Literal["computed", "learned", "fixed"],
    *,
    kl_weight: float | Literal["auto"] = 1.0,
    logits: bool = True,
    gamma: float | None = None,
    accumulate: bool = False,
) -> GaussianVAELoss:
    """The loss that `--balance` names; `gamma` is for "fixed" only, `accumulate` for "computed"."""
    if balance == "computed":
        return BalancedLoss(kl_weight, logits, accumulate=accumulate)
    if balance == "learned":
        return LearnedGammaLoss(kl_weight, logits)
    return FixedGammaLoss(gamma=gamma, kl_weight=kl_weight, logits=logits)


def _build(config: "Config", **arguments: Any) -> GaussianVAELoss:
    return make_loss(config.balance, gamma=config.resolved_gamma(), **arguments)  # type: ignore[arg-type]


def _check_unused(config: "Config") -> None:
    for name in ("gamma", "beta"):
        if getattr(config, name) is not None:
            raise UserError(f"--{name} needs --balance fixed, not {config.balance}")


def _check_fixed(config: "Config") -> None:
    given = [name for name in ("gamma", "beta") if getattr(config, name) is not None]
    if len(given) != 1:
        raise UserError("--balance fixed needs exactly one of --gamma and --beta")
    # gamma^2 and its inverse must be float32 numbers.
    if not 1e-15 <= getattr(config, given[0]) <= 1e15:
        raise UserError(f"--{given[0]} must be a number from 1e-15 to 1e15")


COMPUTED = Part("computed", _build, _check_unused)
LEARNED = Part("learned", _build, _check_unused)
FIXED = Part("fixed", _build, _check_fixed, uses=("gamma", "beta"))
