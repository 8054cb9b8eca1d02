"""Training of the priors that are networks."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from bvae.machine import has_bf16
from bvae.models.priors.base import Progress

Module = TypeVar("Module", bound=nn.Module)

WARM_UP = 500  # steps in which the learning rate rises, at most a tenth of all
MAX_NORM = 1.0  # largest norm of the gradient


def train(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    decay: float,
    progress: Progress,
) -> None:
    """Minimises `loss` of a batch; the module ends with the moving average of its parameters.

    Adam with a learning rate that rises linearly and then falls to 0 as a cosine; gradients are clipped. Step t of the
    moving average keeps min(decay, (1 + t) / (10 + t)) of the old value, so that a short run is not dominated by the
    initial weights.
    """
    parameters: list[torch.Tensor] = list(module.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    warm_up = max(1, min(WARM_UP, steps // 10))
    for step, batch in enumerate(islice(batches, steps)):
        left = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, 1) * left
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + step) / (10 + step)))
        progress(step + 1, steps)
    with torch.no_grad():
        for p, average in zip(parameters, averages, strict=True):
            p.copy_(average)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the device has units for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


def seeded(build: Callable[[], Module], seed: int) -> Module:
    """build() with torch's CPU generator seeded; the generator's state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too, which is not put back
        return build()
