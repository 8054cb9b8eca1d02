"""A second CUDA stream for the branch of a block that another branch does not wait for.

Off unless a recording turns it on (bvae/engine/graph.py). Backward, autograd runs each operation on the stream of its
forward pass and orders the two itself, so that the branch's gradients are made there too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_side: torch.cuda.Stream | None = None


@contextmanager
def side_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Inside, `beside` uses this stream; None: the current one, as outside."""
    global _side
    before, _side = _side, stream
    try:
        yield
    finally:
        _side = before


def beside(branch: Callable[[Tensor], T], x: Tensor) -> tuple[T, Callable[..., None]]:
    """(branch(x), join). What the branch gave may be used after `join(tensor, ...)`, which names its tensors."""
    side = _side
    if side is None:
        return branch(x), lambda *tensors: None
    here = torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        out = branch(x)
    # The allocator must not give memory away that the other stream still reads.
    x.record_stream(side)

    def join(*tensors: Tensor) -> None:
        here.wait_stream(side)
        for t in tensors:
            t.record_stream(here)

    return out, join
