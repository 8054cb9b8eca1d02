"""Image data sets as uint8 arrays: generated shapes, CIFAR-10, MNIST, NumPy files, prepared stores, encoded images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bvae.data.dataset import Dataset, Factors, load
    from bvae.data.store import Store

__all__ = ["Dataset", "Factors", "Store", "load"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is: decoding workers need little of this package, and start often."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module("bvae.data.store" if name == "Store" else "bvae.data.dataset")
    globals()[name] = value = getattr(home, name)
    return value
