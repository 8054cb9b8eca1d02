"""What a forward pass is part of: a repetition for activation checkpointing, a torch.func transform, several ranks."""

import sys

import torch
import torch.distributed as dist
from torch.utils import checkpoint


def recomputing() -> bool:
    """Whether torch.utils.checkpoint(use_reentrant=False) repeats a forward pass whose effects have already happened.

    With use_reentrant=True the first pass runs under no_grad and has none; its repetition is the one that counts.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__ and frame.f_code.co_name in ("recompute_fn", "backward"):
            return frame.f_code.co_name == "recompute_fn"
        frame = frame.f_back  # type: ignore[assignment]
    return False


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jacrev ...) runs the caller."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def group_size(group: dist.ProcessGroup | None) -> int:
    """The number of ranks in a process group; of the default one where `group` is None; 1 outside of a job."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)
