"""What all balances share: the arguments, the KL and its weight, gamma^2 as state that stays float32."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from bvae import ops, reference

DECAY = 0.99  # weight of the old gamma2 in the running estimate, the authors' code
FLOOR = 1e-8  # ours: keeps 1/gamma2 finite when the reconstruction becomes exact


class Loss(NamedTuple):
    """The loss and its parts, scalars on the device; only `loss` carries a gradient."""

    loss: Tensor
    """mean over the batch of sse/(2 gamma2) + weight*KL + D log gamma + D/2 log 2 pi"""
    nll: Tensor
    """the same without the KL: the Gaussian negative log-likelihood per sample, in nats"""
    kl: Tensor
    """KL per sample, in nats, unweighted and unclipped"""
    mse: Tensor
    """mean squared error per element of the batch"""
    gamma2: Tensor
    """the gamma^2 that this loss used"""
    weight: float | Tensor
    """the weight of the KL that this loss used: a number, or a scalar on the device where something moves it"""


class GaussianVAELoss(nn.Module):
    """The base of all balances: arguments, the KL and its weight, gamma2 as state. Use one of the subclasses.

    State: `gamma2`, float32 whatever the model is cast to, and `skipped`, the number of batches it did not follow.

    Args:
        kl_weight: weight of the KL, or "auto" for (2*side/k)^2, defined for square images [B,C,side,side]. May be set
            anew at any time.
        logits: whether the reconstruction is logits of an image in [0,1] (the sigmoid is then fused into the loss).
    """

    per_latent: ClassVar[bool] = False
    """whether forward takes as `kl` the sums [k] of every latent (ops.sample_kl with per_latent=True)"""
    timed: ClassVar[bool] = False
    """whether the constructor needs `total_steps`"""
    gamma2: Tensor
    skipped: Tensor
    pool: Callable[[Tensor], Tensor] | None = None
    """means over the ranks that share a batch, of a tensor of figures; by default of the process group's ranks"""

    def __init__(self, gamma2: float, kl_weight: float | Literal["auto"], logits: bool) -> None:
        super().__init__()
        self._initial: dict[str, float] = {}
        self._types: dict[str, torch.dtype] = {}
        self._weight_tensor: Tensor | None = None
        self._kl_weight = _checked_weight(kl_weight)
        self.logits = logits
        self._register("gamma2", gamma2)
        self._register("skipped", 0, torch.int64)

    # ---- state ----------------------------------------------------------------------------------------------------

    def _register(self, name: str, initial: float, dtype: torch.dtype = torch.float32) -> None:
        """Adds a scalar to the state."""
        self._initial[name], self._types[name] = initial, dtype
        self.register_buffer(name, torch.tensor(initial, dtype=dtype))

    def reset_parameters(self) -> None:
        """Puts the state back to its start; it fills what `to_empty()` made of a module built on the meta device."""
        for name, initial in self._initial.items():
            getattr(self, name).fill_(initial)
        if self._weight_tensor is not None:
            self._weight_tensor.fill_(float(self._kl_weight))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a training step moves here, by name: to be put back where the step is undone.

        Without `skipped`, which counts the steps that are.
        """
        return {name: buffer for name, buffer in self.named_buffers() if name != "skipped"}

    def __getattr__(self, name: str) -> Any:
        # Some frameworks set tensors of another type past `_apply`; whoever reads the state gets it as it must be.
        value = super().__getattr__(name)
        dtype = self.__dict__.get("_types", {}).get(name)
        if dtype is not None and isinstance(value, Tensor) and value.dtype != dtype:
            self._buffers[name] = value = value.to(dtype)
        return value

    def _keep_types(self) -> None:
        """Makes all of the state what it must be, for those who read it past `__getattr__`."""
        for name in self._types:
            getattr(self, name)

    def _unregistered(self) -> tuple[str, ...]:
        """Names of tensors that move with the module but are no buffers."""
        return () if self._weight_tensor is None else ("_weight_tensor",)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name in self._unregistered():
            kept[name] = getattr(self, name)
            setattr(self, name, fn(kept[name]))
        for name, tensor in kept.items():  # .half() and .bfloat16() move the state but do not round it
            moved: Any = self._buffers[name] if name in self._buffers else getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._keep_types()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._keep_types()

    # ---- the weight of the KL -------------------------------------------------------------------------------------

    @property
    def kl_weight(self) -> float | Literal["auto"]:
        """Weight of the KL. A new number is filled into a tensor: torch.compile recompiles once, not at each change."""
        return self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value: float | Literal["auto"]) -> None:
        self._kl_weight = _checked_weight(value)
        if value == "auto":
            self._weight_tensor = None
        elif self._weight_tensor is None:
            self._weight_tensor = torch.full((), float(value), dtype=torch.float32, device=self.gamma2.device)
        else:
            self._weight_tensor.fill_(float(value))

    def _weight(self, recon: Tensor, latents: int | None) -> tuple[float, Tensor | None]:
        """Two factors of the KL's weight: a number, and a scalar on the device or None."""
        if self._weight_tensor is not None:
            return 1.0, self._weight_tensor
        if self._kl_weight != "auto":
            return float(self._kl_weight), None
        if recon.ndim != 4 or recon.shape[2] != recon.shape[3]:
            raise ValueError(f"kl_weight 'auto' needs square images [B,C,side,side], not {tuple(recon.shape)}")
        if not latents:
            raise ValueError("kl_weight 'auto' needs the number of latents: give mu, or latents beside kl")
        return reference.auto_kl_weight(recon.shape[2], latents), None

    @staticmethod
    def _times(moved: Tensor, kl_weight: float, weight: Tensor | None) -> tuple[float, Tensor]:
        """The factors of the KL's weight, multiplied by one that a rule moves."""
        return kl_weight, moved if weight is None else moved * weight

    # ---- the loss -------------------------------------------------------------------------------------------------

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
            kl: instead of mu and log_sigma, the KL already summed over the batch (ops.sample_kl gives it); a number,
                or where the loss is `per_latent` [k].
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
        elif self.per_latent and kl.ndim != 1:
            raise ValueError(f"kl must be [k], summed over the batch alone, not {tuple(kl.shape)}: see ops.sample_kl")
        elif not self.per_latent and kl.numel() != 1:
            raise ValueError(f"kl must be one number, the sum over the batch, not {tuple(kl.shape)}: give kl.sum()")
        self._keep_types()
        return self._loss(recon, target, kl, *self._weight(recon, latents))

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
        terms = reference.kl(mu.to(wide), log_sigma.to(wide))
        latents = math.prod(mu.shape[1:])
        return terms.reshape(len(terms), latents).sum(0) if self.per_latent else terms.sum(), latents

    def _loss(self, recon: Tensor, target: Tensor, kl: Tensor, kl_weight: float, weight: Tensor | None) -> Loss:
        raise NotImplementedError

    def _fused(
        self,
        recon: Tensor,
        target: Tensor,
        kl: Tensor,
        kl_weight: float,
        weight: Tensor | None,
        update: bool = False,
        monotone: bool = True,
    ) -> tuple[Loss, Tensor]:
        """The loss with the gamma2 of the state, and the sum of squares."""
        out = ops.balanced_loss(
            recon,
            target,
            kl,
            self.gamma2,
            self.skipped,
            kl_weight=kl_weight,
            weight=weight,
            logits=self.logits,
            update=update,
            decay=DECAY,
            floor=FLOOR,
            monotone=monotone,
        )
        mse, kl_mean, gamma2, nll = out.stats.unbind()
        # The product is a copy of the weight, which the rule may move before anybody reads it.
        used = kl_weight if weight is None else kl_weight * weight
        return Loss(out.loss, nll, kl_mean, mse, gamma2, used), out.sse

    def current_gamma2(self) -> Tensor:
        """The gamma^2 that the next loss will use, a scalar on the device; 0 before a start from the first batch."""
        self._keep_types()
        return self.gamma2

    def step(self) -> None:
        """Ends an optimiser step of several forward passes; nothing here depends on it."""

    def follow(self, mse: Tensor, kl: Tensor) -> None:
        """Ends a training step whose mean mse and KL, over its parts and ranks, the caller has found.

        Args:
            mse: per element, a scalar on the device. kl: per sample, in nats, the same. Nothing here depends on them.
        """

    def extras(self) -> dict[str, Tensor]:
        """Further figures of the rule worth a curve, scalars on the device."""
        return {}

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight}, logits={self.logits}"


def _checked_weight(kl_weight: float | Literal["auto"]) -> float | Literal["auto"]:
    if kl_weight != "auto" and (isinstance(kl_weight, str) or not 0 <= float(kl_weight) < math.inf):
        raise ValueError(f"kl_weight must be 'auto' or a number of at least 0, not {kl_weight!r}")
    return kl_weight
