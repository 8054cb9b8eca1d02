"""Weights and biases with a bf16 copy that the optimiser keeps: a step casts neither them nor their gradients."""

from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.models import layer_ops
from bvae.models.plain import layers_are_plain


class Halved:
    """A layer whose parameters `halved` may have such copies: as `bf16_copy`, a leaf that takes the gradient."""

    @property
    def halved(self) -> tuple[str, ...]:
        return ("weight", "bias")


def half_of(weight: Tensor) -> Tensor:
    """What a layer is to compute with: the copy under bf16 autocast where there is one, or the weight."""
    half: Tensor | None = getattr(weight, "bf16_copy", None)
    if half is None or not torch.is_autocast_enabled(weight.device.type):
        return weight
    return half


def halved_weights(model: nn.Module) -> list[nn.Parameter]:
    return [getattr(m, name) for m in model.modules() if isinstance(m, Halved) for name in m.halved]


def on_cuda(device: torch.device) -> bool:
    """Whether layers are arranged for a GPU, where every pass over memory is a kernel of its own."""
    return device.type == "cuda"


class Linear(Halved, nn.Linear):
    weight: Tensor

    @property
    def halved(self) -> tuple[str, ...]:
        # Of two bf16 gradients of biases in one loop, Inductor makes C++ that does not compile (torch 2.13).
        return ("weight", "bias") if on_cuda(self.weight.device) else ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, half_of(self.weight), half_of(self.bias))


class LinearReLU(Linear):
    """The same, followed by a ReLU."""

    counters: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("counters", torch.zeros(outputs, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if layers_are_plain() or not on_cuda(x.device):
            return F.relu(super().forward(x))
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight, bias = half_of(self.weight).to(dtype), half_of(self.bias).to(dtype)
        return layer_ops.linear_relu(x.to(dtype), weight, bias, self.counters)


def widened(x: Tensor) -> Tensor:
    """`x` in float32, where it is of a narrower type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Head(nn.Linear):
    """A dense layer in float32, whatever the autocast; weights of a narrower type are widened for it.

    For what must not be rounded to bf16, such as a posterior: that moves the KL of a sharp latent by percents.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(widened(x), widened(self.weight), widened(self.bias))


class Copies:
    """bf16 copies of weights, which their layers compute with inside `with`, and nowhere else.

    ops.adam moves weights and copies alike. `refresh` notices other changes, and `with` begins with it. A CUDA graph
    runs no Python: `refresh` must come before it is recorded, or every replay would refresh, and before every replay.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.of: dict[nn.Parameter, Tensor] = {p: p.detach().to(torch.bfloat16).requires_grad_() for p in weights}
        self._versions = [p._version for p in weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copies those of the weights, where somebody has changed these: loaded others, put old ones back."""
        versions = [p._version for p in self.of]
        if versions != self._versions:
            for (p, half), version, known in zip(self.of.items(), versions, self._versions, strict=True):
                if version != known:
                    half.copy_(p)
            self._versions = versions

    @torch.no_grad()
    def renew(self) -> None:
        """Makes all copies those of the weights: of changes by a CUDA graph, `refresh` learns nothing."""
        if self.of:
            torch._foreach_copy_(list(self.of.values()), list(self.of.keys()))
        self._versions = [p._version for p in self.of]

    def __enter__(self) -> Self:
        self.refresh()
        for p, half in self.of.items():
            p.bf16_copy = half  # type: ignore[attr-defined]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for p in self.of:
            del p.bf16_copy  # type: ignore[attr-defined]
