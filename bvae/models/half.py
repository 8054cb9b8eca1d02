"""Weights with a bf16 copy that the optimiser keeps: a step under autocast casts neither them nor their gradients."""

from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Halved:
    """A layer whose `weight` may have such a copy: its attribute `bf16_copy`, a leaf that takes the gradient."""

    weight: Tensor


def half_of(weight: Tensor) -> Tensor:
    """What a layer is to compute with: the copy in training under bf16 autocast where there is one, or the weight."""
    half: Tensor | None = getattr(weight, "bf16_copy", None)
    if half is None or not torch.is_grad_enabled() or not torch.is_autocast_enabled(weight.device.type):
        return weight
    return half


def halved_weights(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, Halved)]  # type: ignore[misc]


class Linear(Halved, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, half_of(self.weight), self.bias)


class Copies:
    """bf16 copies of weights, which their layers compute with inside `with`, and nowhere else.

    Whoever moves a weight through a raw pointer moves its copy too; other changes are noticed at the next `with`.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.of: dict[nn.Parameter, Tensor] = {p: p.detach().to(torch.bfloat16).requires_grad_() for p in weights}
        self._versions = {p: p._version for p in weights}

    def __enter__(self) -> Self:
        for p, half in self.of.items():
            if self._versions[p] != p._version:  # somebody loaded other weights
                half.data.copy_(p)
                self._versions[p] = p._version
            p.bf16_copy = half  # type: ignore[attr-defined]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for p in self.of:
            del p.bf16_copy  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        for half in self.of.values():
            half.grad = None
