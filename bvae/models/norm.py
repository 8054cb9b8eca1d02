"""Batch normalisation with TensorFlow 1's zero-debiased moving averages.

The running statistics start at zero and every step mixes in the batch's with weight 1 - decay; what is used is the
accumulator divided by the weight it has gathered, so that step t counts (1-d)/(1-d^t): no bias towards a made-up
start (as in Dai & Wipf's and Asperti & Trentin's code: tf.contrib.layers.batch_norm, decay 0.999).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import reference
from bvae.models import layer_ops
from bvae.models.plain import layers_are_plain


class BatchNorm2d(nn.Module):
    """Batch normalisation over [B,C,H,W] (per channel), affine.

    `gather` is None, or what makes [ranks, ...] of a tensor, differentiably: the statistics are then those of the
    batch over all ranks, of which each holds an equal part.

    Buffers: `running_mean`, `running_var` [C] are sums of batch statistics weighted as above and `running_weight`
    (scalar) is the sum of those weights; the statistics in use are the former divided by the latter. `counters` [C]
    are the kernels' (see layer_ops.batch_norm_relu), no state.
    """

    running_mean: Tensor
    running_var: Tensor
    running_weight: Tensor
    counters: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, decay: float = 0.999) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = 1.0 - decay
        self.gather: Callable[[Tensor], Tensor] | None = None
        self.frozen: tuple[Tensor, Tensor] | None = None  # see frozen_statistics
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))
        self.register_buffer("running_weight", torch.zeros(()))
        self.register_buffer("counters", torch.zeros(channels, dtype=torch.int32), persistent=False)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] used in eval mode; (0, 1) before the first training step."""
        if self.frozen is not None:
            return self.frozen
        seen = self.running_weight > 0
        weight = torch.where(seen, self.running_weight, 1.0)
        return self.running_mean / weight, torch.where(seen, self.running_var / weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            mean, var = self.statistics()
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        self.running_weight.lerp_(torch.ones_like(self.running_weight), self.momentum)
        if self.gather is not None:
            return self._over_ranks(x, self.gather)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )

    def _over_ranks(self, x: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with each rank's mean and variance put together: the mean's variance over the ranks adds to it."""
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        means, variances = gather(torch.stack([mean, var])).unbind(1)  # each [ranks,C]
        mean = means.mean(0)
        var = variances.mean(0) + means.var(0, correction=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * len(means)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # unbiased, as F.batch_norm keeps it
        scale = (self.weight * (var + self.eps).rsqrt()).view(-1, 1, 1)
        return ((x - mean.view(-1, 1, 1)) * scale + self.bias.view(-1, 1, 1)).to(x.dtype)


class BatchNormReLU(BatchNorm2d):
    """The same, followed by a ReLU. `offset` [C] float32 is a bias that x still lacks."""

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        if not self._fusible():
            return F.relu(super().forward(_shifted(x, offset)))
        y: Tensor = self._fused(x, offset, through=False)
        return y

    def beside(self, x: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What forward gives, and x + offset for a shortcut beside it."""
        if not self._fusible():
            x = _shifted(x, offset)
            return F.relu(super().forward(x)), x
        both: tuple[Tensor, Tensor] = self._fused(x, offset, through=True)
        return both

    def _fusible(self) -> bool:
        return self.training and self.gather is None and self.weight.dtype == torch.float32

    def _fused(self, x: Tensor, offset: Tensor | None, through: bool) -> Any:
        module = reference if layers_are_plain() else layer_ops
        running = self.running_mean, self.running_var, self.running_weight
        return module.batch_norm_relu(
            x, self.weight, self.bias, running, self.counters, self.momentum, self.eps, offset=offset, through=through
        )


def _shifted(x: Tensor, offset: Tensor | None) -> Tensor:
    return x if offset is None else (x + offset.view(-1, 1, 1)).to(x.dtype)


Norm = BatchNorm2d | nn.modules.batchnorm._BatchNorm
"""ours, or one of torch's"""


def batch_norms(model: nn.Module) -> Iterator[BatchNorm2d]:
    """The batch norms of our own networks."""
    return (m for m in model.modules() if isinstance(m, BatchNorm2d))


def running_norms(model: nn.Module) -> Iterator[Norm]:
    """Every batch norm that keeps running statistics, torch's among them."""
    return (m for m in model.modules() if isinstance(m, Norm) and m.running_mean is not None)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms in eval mode keep to the statistics of its beginning: made once, not in every pass."""
    norms = list(batch_norms(model))
    try:
        for n in norms:
            n.frozen = n.statistics()
        yield
    finally:
        for n in norms:
            n.frozen = None


class MeanStatistics:
    """Replaces every batch norm's running statistics, torch's included, by their plain mean over batches.

    A context around passes of the model. Each pass must run every batch norm once, in training mode, and be followed by
    `add`; without any, and where an error ends it, nothing changes. All other modules are in eval mode meanwhile: the
    statistics are those of the network that is evaluated, without dropout. Modules are left in the mode they were in.

    A pass with `add` is the same operations on the same tensors every time: recorded as a CUDA graph in one such
    context, it can be replayed in others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms = list(running_norms(model))
        self.buffers = [
            t
            for n in self.norms
            for t in (n.running_mean, n.running_var, getattr(n, "running_weight", None))
            if t is not None
        ]
        device = next(model.parameters()).device
        self.one, self.count = torch.ones((), device=device), torch.zeros((), device=device)
        self.totals = [torch.zeros_like(t) for t in self.buffers]
        self.kept: list[Tensor] = []
        self.momentum: list[float | None] = []
        self.modes: list[tuple[nn.Module, bool]] = []

    @torch.no_grad()
    def __enter__(self) -> Self:
        self.modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        self.kept = [t.clone() for t in self.buffers]
        self.momentum = [n.momentum for n in self.norms]
        for n in self.norms:
            n.train()
            n.momentum = 1.0
        # A momentum of 1 forgets what was there, but not a NaN.
        torch._foreach_zero_([*self.totals, self.count, *self.buffers])
        return self

    @torch.no_grad()
    def add(self) -> None:
        """Adds the statistics that the pass before it has left."""
        torch._foreach_add_([*self.totals, self.count], [*self.buffers, self.one])

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for m, mode in self.modes:
            m.training = mode
        for n, momentum in zip(self.norms, self.momentum, strict=True):
            n.momentum = momentum
        for t, total, kept in zip(self.buffers, self.totals, self.kept, strict=True):
            mean = torch.where(self.count > 0, total / self.count, kept)
            t.copy_(mean if error is None else kept)


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object]) -> int:
    """MeanStatistics over `batches`, of which `forward(x)` runs a pass: under the weights as they are.

    The moving averages lag while the weights move fast (docs/method.md gives figures). Returns the number of batches
    used.
    """
    count = 0
    if not any(True for _ in running_norms(model)):
        return count
    with MeanStatistics(model) as statistics:
        for x in batches:
            forward(x)
            statistics.add()
            count += 1
    return count
