"""NumPy files (.npy, .npz), pairs of them in a folder, and the check that every array of images passes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from bvae.data.recipe import Size, both_sides, size_text
from bvae.data.refusal import refusal

# (train, val, test) in an .npz: the first of these of which one is there.
NPZ_KEYS = (
    ("train", "val", "test"),
    ("x_train", "x_val", "x_test"),
    ("X_train", "X_val", "X_test"),
    ("train_images", "val_images", "test_images"),
    ("images", "val_images", "test_images"),
    ("train_x", "val_x", "test_x"),
)
ALL = "all"  # stands for a split where there is none


@dataclass(frozen=True)
class NpzImages:
    """The arrays of images in an .npz.

    splits: of "train", "val" and "test" those that there are, or `ALL`: what reads each.
    keys: their names in the file.
    unused: names and shapes of other arrays that look like images.
    """

    splits: dict[str, Callable[[], np.ndarray]]
    keys: dict[str, str]
    unused: list[str]


def read_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, of whatever shape and dtype, mapped into memory. Objects are never unpickled."""
    array = _open(path)
    if not isinstance(array, np.ndarray):
        array.close()
        raise refusal(path, "this is an .npz archive under another name; rename it to .npz")
    return array


def open_npz(path: Path) -> NpzImages:
    """Finds the images in an .npz file, and reads none of them yet.

    These are the arrays with the names of `NPZ_KEYS`; without any of these the only array, or the only one that looks
    like images, of whatever name (`arr_0` of many samplers); or `data` beside `labels`, uint8 [N, 3*S*S] with the
    channels one after another, as ImageNet is published in small sizes.

    Raises:
        UserError: if it is no .npz, or it is not clear which array is meant.
    """
    archive = _open(path)
    if isinstance(archive, np.ndarray):
        raise refusal(path, "this is a .npy array under another name; rename it to .npy")
    with archive:
        shapes = {key: _shape_of(archive, key) for key in archive.files}
    alike = [
        key for key, (shape, dtype) in shapes.items() if len(shape) in (3, 4) and (dtype == "uint8" or "f" in dtype)
    ]
    keys: dict[str, str] = {}
    # First the names of which that for train is there.
    for names in sorted(NPZ_KEYS, key=lambda names: names[0] not in shapes):
        keys = {split: name for split, name in zip(("train", "val", "test"), names, strict=True) if name in shapes}
        if keys:
            break
    if not keys:
        if len(shapes) == 1 or len(alike) == 1:
            keys = {ALL: (alike or list(shapes))[0]}
        elif _is_flat(shapes):
            keys = {ALL: "data"}
        else:
            found = ", ".join(f"{key} {list(shape)}" for key, (shape, _) in list(shapes.items())[:8]) or "none"
            raise refusal(path, f"which array? Expected train (and test) or a single array of images, found: {found}")
    flat = _is_flat(shapes) and keys == {ALL: "data"}
    return NpzImages(
        {split: partial(_read_member, path, key, flat) for split, key in keys.items()},
        keys,
        [f"{key} {list(shapes[key][0])}" for key in alike if key not in keys.values()],
    )


def _shape_of(archive: np.lib.npyio.NpzFile, key: str) -> tuple[tuple[int, ...], str]:
    """(shape, name of the dtype) by a member's header; of none where it cannot be read, which reading it will say."""
    try:
        with archive.zip.open(f"{key}.npy") as file:  # type: ignore[union-attr]
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        return shape, dtype.name
    except Exception:
        return (), ""


def _is_flat(shapes: dict[str, tuple[tuple[int, ...], str]]) -> bool:
    shape, dtype = shapes.get("data", ((), ""))
    return (
        "labels" in shapes and dtype == "uint8" and len(shape) == 2 and shape[1] == 3 * math.isqrt(shape[1] // 3) ** 2
    )


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
        """Rows by a row number, a slice, or an array of row numbers or bools."""
        return self.base[self.index[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.base[self.index], dtype)


def divide(images: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the others, the chosen) of images [N, ...], by bool [N]; each in the order it had.

    If the images are mapped, the chosen ones are read, and `Rows` stand in for the others.
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


def _read_member(path: Path, key: str, flat: bool) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[key]
    except Exception as error:
        raise refusal(f"{path}[{key}]", "not a readable array", error) from error
    if not isinstance(array, np.ndarray):  # NumPy hands over a member that is no array as bytes
        raise refusal(f"{path}[{key}]", "not an array")
    if flat:
        side = math.isqrt(array.shape[1] // 3)
        array = array.reshape(len(array), 3, side, side).transpose(0, 2, 3, 1)
    return array
