"""Weights of which the optimiser keeps a bf16 copy: a step under autocast casts neither them nor their gradients."""

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
