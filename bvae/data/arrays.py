"""NumPy files (.npy, .npz), pairs of them in a folder, and the check that every array of images passes."""

from pathlib import Path
from typing import Any, cast

import numpy as np

from bvae.data.recipe import Size, both_sides, size_text
from bvae.data.refusal import refusal

# (train, test) in an .npz: the first pair whose train is there. Without any, a single array is train.
NPZ_KEYS = (("train", "test"), ("x_train", "x_test"), ("images", "test_images"))


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, of whatever shape and dtype, mapped into memory. Objects are never unpickled."""
    array = _open(path)
    if not isinstance(array, np.ndarray):
        array.close()
        raise refusal(path, "this is an .npz archive under another name; rename it to .npz")
    return array


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(train, test) in an .npz file: the first pair of `NPZ_KEYS` that is there, or else the only array there is."""
    archive = _open(path)
    if isinstance(archive, np.ndarray):
        raise refusal(path, "this is a .npy array under another name; rename it to .npy")
    with archive:
        train_key, test_key = _choose_keys(path, archive.files)
        train = _read_member(path, archive, train_key)
        return train, _read_member(path, archive, test_key) if test_key else None


def read_pair(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) of a folder with `train.npy` and `test.npy`, mapped into memory, not yet read."""
    for name in ("train.npy", "test.npy"):
        if not (folder / name).is_file():
            raise refusal(folder, f"a prepared store needs train.npy and test.npy, and {name} is missing")
    return read_npy(folder / "train.npy"), read_npy(folder / "test.npy")


class Rows:
    """Some rows of a mapped array, read when they are asked for. It stands in for the array of these rows.

    base: uint8 [M, ...], mapped.
    index: int64 [N], which rows of it.
    """

    def __init__(self, base: np.ndarray, index: np.ndarray) -> None:
        self.base, self.index = base, index
        self.shape = (len(index), *base.shape[1:])
        self.dtype, self.ndim, self.nbytes = base.dtype, base.ndim, len(index) * base[:1].nbytes

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Of a row number, a slice, or an array of row numbers or bools."""
        return self.base[self.index[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.base[self.index], dtype)


def divide(images: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the others, the chosen) of images [N, ...], by bool [N]; each in the order it had.

    Of mapped images the chosen are read, and `Rows` stand in for the others.
    """
    others = np.flatnonzero(~chosen)
    if isinstance(images, Rows):
        return cast(np.ndarray, Rows(images.base, images.index[others])), images[chosen]
    taken = np.asarray(images[chosen])
    return (cast(np.ndarray, Rows(images, others)) if isinstance(images, np.memmap) else images[others]), taken


def as_array(images: Any, where: str) -> np.ndarray:
    """A NumPy array, or the contents of a tensor, as an array; UserError for what is neither."""
    if hasattr(images, "detach"):
        images = images.detach().cpu().numpy()
    if not isinstance(images, np.ndarray | Rows):
        raise refusal(where, f"a NumPy array or a tensor is expected, not {type(images).__name__}")
    return cast(np.ndarray, images)


def image_size(array: np.ndarray, where: str) -> tuple[tuple[int, int], int]:
    """((height, width), channels) of [N, H, W, C] or [N, H, W]. Raises UserError for another shape."""
    if array.ndim not in (3, 4):
        raise refusal(where, f"has shape {list(array.shape)}; [N, H, W, C] or [N, H, W] is expected")
    height, width = array.shape[1:3]
    return (height, width), array.shape[3] if array.ndim == 4 else 1


def check_images(array: np.ndarray, where: str, side: Size, channels: int, mapped: bool = False) -> np.ndarray:
    """The array as C-contiguous, writable uint8 [N, height, width, channels] in memory, unless it is something else.

    Args:
        array: uint8 [N, H, W, C] or, for one channel, [N, H, W].
        where: the file, and the key or folder in it, for messages.
        side: height and width that are expected, or one number for both.
        mapped: leave a C-contiguous mapped array as it is, on the disk and read-only.

    Raises:
        UserError: for any other dtype or shape. Nothing is converted, since a guess would train on the wrong pixels.
    """
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise refusal(where, f"holds {array.dtype} values; uint8 pixels in 0..255 are expected")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise refusal(where, f"has shape {shape}; [N, H, W, C] or [N, H, W] is expected")
    num, height, width, depth = array.shape
    if num == 0:
        raise refusal(where, f"holds no images (shape {shape})")
    if depth not in (1, 3):
        hint = "; channels come last" if height in (1, 3) else ""
        raise refusal(where, f"has shape {shape}; [N, H, W, C] with 1 or 3 channels is expected{hint}")
    if depth != channels:
        raise refusal(
            where, f"holds images of {depth} channel(s), {channels} expected: pass --channels {depth} or other data"
        )
    if (height, width) != (expected := both_sides(side)):
        raise refusal(
            where,
            f"holds images of {height}x{width}, {expected[0]}x{expected[1]} expected: "
            f"pass --side {size_text(height, width)} or resize them",
        )
    if mapped and (isinstance(array, Rows) or (isinstance(array, np.memmap) and array.flags.c_contiguous)):
        return array
    # A copy of mapped or read-only memory: nothing may change under a run, and torch wants writable arrays.
    if not array.flags.writeable or isinstance(array, np.memmap):
        return np.array(array, order="C", subok=False)
    return np.ascontiguousarray(array)


def _open(path: Path) -> np.ndarray | np.lib.npyio.NpzFile:
    """The file's array, mapped and not yet read, so that a wrong shape costs nothing; or its archive of arrays."""
    # A damaged header or archive makes the parsers below fail in many ways (ValueError, SyntaxError, BadZipFile,
    # MemoryError, ...): all of them mean this.
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise refusal(path, "not a readable NumPy file", error) from error


def _read_member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except Exception as error:
        raise refusal(f"{path}[{key}]", "not a readable array", error) from error
    if not isinstance(array, np.ndarray):  # NumPy hands over a member that is no array as bytes
        raise refusal(f"{path}[{key}]", "not an array")
    return array


def _choose_keys(path: Path, keys: list[str]) -> tuple[str, str | None]:
    for train, test in NPZ_KEYS:
        if train in keys:
            return train, test if test in keys else None
    if len(keys) != 1:
        found = ", ".join(keys[:8]) or "none"
        raise refusal(path, f"which array to use? Expected train (and test) or a single array, found: {found}")
    return keys[0], None
