"""PyTorch's own layers in the place of fused ones, for those who differentiate twice."""

from collections.abc import Iterator
from contextlib import contextmanager

_plain = False


def layers_are_plain() -> bool:
    return _plain


@contextmanager
def plain_layers() -> Iterator[None]:
    """Inside, the networks' forward passes use PyTorch's own functions alone, which can be differentiated twice.

    A gradient penalty needs that: bvae's fused layers have first derivatives only. Slower; the same results to
    rounding, and parameters and statistics are the same. It holds for the passes made inside, wherever their backward
    passes are made, and in every thread.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
