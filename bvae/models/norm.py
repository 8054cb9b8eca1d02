"""Batch normalisation with TensorFlow 1's zero-debiased moving averages.

The running statistics start at zero and every step mixes in the batch's with weight 1 - decay; what is used is the
accumulator divided by the weight it has gathered, so that step t counts (1-d)/(1-d^t): no bias towards a made-up
start (as in Dai & Wipf's and Asperti & Trentin's code: tf.contrib.layers.batch_norm, decay 0.999).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import ops


class BatchNorm2d(nn.Module):
    """Batch normalisation over [B,C,H,W] (per channel), affine.

    `gather` is None, or what makes [ranks, ...] of a tensor, differentiably: the statistics are then those of the
    batch over all ranks, of which each holds an equal part.

    Buffers: `running_mean`, `running_var` [C] are sums of batch statistics weighted as above and `running_weight`
    (scalar) is the sum of those weights; the statistics in use are the former divided by the latter.
    """

    running_mean: Tensor
    running_var: Tensor
    running_weight: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, decay: float = 0.999) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = 1.0 - decay
        self.gather: Callable[[Tensor], Tensor] | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))
        self.register_buffer("running_weight", torch.zeros(()))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] used in eval mode; (0, 1) before the first training step."""
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
    """The same, followed by a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.gather is not None or self.weight.dtype != torch.float32:
            return F.relu(super().forward(x))
        self.running_weight.lerp_(torch.ones_like(self.running_weight), self.momentum)
        return ops.batch_norm_relu(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )


Norm = BatchNorm2d | nn.modules.batchnorm._BatchNorm
"""ours, or one of torch's"""


def batch_norms(model: nn.Module) -> Iterator[BatchNorm2d]:
    """The batch norms of our own networks."""
    return (m for m in model.modules() if isinstance(m, BatchNorm2d))


def running_norms(model: nn.Module) -> Iterator[Norm]:
    """Every batch norm that keeps running statistics, torch's among them."""
    return (m for m in model.modules() if isinstance(m, Norm) and m.running_mean is not None)


@contextmanager
def _cumulative(norms: list[Norm]) -> Iterator[Callable[[int], None]]:
    """Lets the statistics be plain means over the batches seen: batch t is mixed in with weight 1/t."""
    kept = [n.momentum for n in norms]

    def begin(batch: int) -> None:
        for n in norms:
            n.momentum = 1.0 / batch
            if batch == 1:  # weight 1 would forget the old values, but not a NaN
                n.running_mean.zero_()  # type: ignore[union-attr]
                n.running_var.zero_()  # type: ignore[union-attr]

    try:
        yield begin
    finally:
        for n, momentum in zip(norms, kept, strict=True):
            n.momentum = momentum


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object]) -> int:
    """Replaces every batch norm's running statistics by their plain mean over `batches` under the weights as they are.

    The moving averages lag while the weights move fast (docs/method.md gives figures). All else of the model is in eval
    mode meanwhile: the statistics are those of the network that is evaluated, without dropout. Returns the number of
    batches used; modules are left in the mode they were in. `forward(x)` must run every batch norm once.
    """
    norms = list(running_norms(model))
    modes = [(m, m.training) for m in model.modules()]
    count = 0
    if not norms:
        return count
    model.eval()
    for n in norms:
        n.train()
    try:
        with _cumulative(norms) as begin:
            for count, x in enumerate(batches, start=1):
                begin(count)
                forward(x)
    finally:
        for m, mode in modes:
            m.training = mode
    return count
