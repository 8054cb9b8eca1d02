"""Data sets that are known by their files: CIFAR-10 and -100, STL-10, SVHN, MNIST's idx files, NumPy files in a folder.

Every command finds them here, so that one path is the same data set to all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from bvae.data import arrays, cifar, idx, stl10, svhn
from bvae.data.recipe import Size
from bvae.data.refusal import refusal
from bvae.data.store import Store, has_meta


@dataclass(frozen=True)
class Named:
    """A data set at a path.

    name: of the set; None for that of its path.
    title: for messages.
    splits: what reads each, uint8 [N, H, W, C] or whatever the file holds; there are `train` and `test`.
    digest: of train and test, where it is known without reading them.
    """

    name: str | None
    title: str
    splits: dict[str, Callable[[], np.ndarray]] = field(repr=False)
    digest: str | None = None


def find(path: Path, side: Size | None = None) -> Named | None:
    """The data set at a path, or None if it is none of these: images, or a single file of arrays.

    Args:
        side: of the images wanted; those of idx files are padded to it, or by default left as they are.

    Raises:
        UserError: if there is some of one, but not all.
    """
    return _in_folder(path, side) if path.is_dir() else _in_tar(path) if path.is_file() else None


def _in_folder(path: Path, side: Size | None) -> Named | None:
    if found := cifar.find_folder(path):
        kind, folder = found
        return Named(kind.name, kind.title, _two(partial(cifar.read_folder, kind, folder)))
    if has_meta(path):
        store = Store.open(path)
        splits = {"train": lambda: store.train, "test": lambda: store.test}
        if len(store.val):
            splits["val"] = lambda: store.val
        return Named(None, "a prepared store", splits, store.digest)
    if (path / "train.npy").exists():
        pair = {name: path / f"{name}.npy" for name in ("train", "val", "test") if (path / f"{name}.npy").is_file()}
        if "test" not in pair:
            raise refusal(path, "a prepared store needs train.npy and test.npy, and test.npy is missing")
        return Named(None, "NumPy files", {split: partial(arrays.read_npy, file) for split, file in pair.items()})
    if files := idx.find(path):
        padding = 0 if side is None else idx.edge(side)
        train, test = (partial(idx.read, file, padding) for file in files)
        return Named(None, "idx files", {"train": train, "test": test})
    for name, title, module in (("stl10", "STL-10", stl10), ("svhn", "SVHN", svhn)):
        if parts := module.find_folder(path):
            return Named(name, title, {split: partial(module.read, file) for split, file in parts.items()})
    return None


def _in_tar(path: Path) -> Named | None:
    if kind := cifar.tar_kind(path):
        return Named(kind.name, kind.title, _two(partial(cifar.read_tar, kind, path)))
    if stl10.is_tar(path):
        read = stl10.tar_reader(path)
        return Named("stl10", "STL-10", {split: partial(read, split) for split in stl10.FILES})
    return None


def _two(read: Callable[[], tuple[np.ndarray, np.ndarray]]) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of train and test from one of both, which reads once."""
    both = cache(read)
    return {"train": lambda: both()[0], "test": lambda: both()[1]}
