"""SVHN's cropped digits, `train_32x32.mat` and `test_32x32.mat`: http://ufldl.stanford.edu/housenumbers.

They are MAT-files of version 5, of which this reads one array of bytes, by name: no SciPy, and no objects.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bvae.data.refusal import refusal

SIDE = 32
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}

_COMPRESSED, _MATRIX, _INT8, _UINT8, _INT32 = 15, 14, 1, 2, 5
_MOST = 2**31  # bytes of one unpacked array; `extra` has 1.6e9


def find_folder(folder: Path) -> dict[str, Path] | None:
    """{split: its file} in a folder; None where neither train's nor test's is there. Raises UserError for one alone."""
    found = {split: folder / name for split, name in FILES.items() if (folder / name).is_file()}
    if "train" not in found and "test" not in found:
        return None
    for split in ("train", "test"):
        if split not in found:
            raise refusal(folder, f"this SVHN is incomplete: {FILES[split]} is missing")
    return found


def read(file: Path) -> np.ndarray:
    """The images of one file, uint8 [N, 32, 32, 3]. Raises UserError where it is damaged or holds something else."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise refusal(file, "cannot be read", error) from error
    if data[124:128] != b"\x00\x01IM":
        hint = " (a MAT-file of version 7.3, which is HDF5)" if b"MATLAB 7.3" in data[:64] else ""
        raise refusal(file, f"not a MAT-file of version 5{hint}")
    try:
        for kind, content in list(_elements(memoryview(data)[128:])):  # all: the file may be cut off behind X
            matrix = content
            if kind == _COMPRESSED:
                inflater = zlib.decompressobj()
                unpacked = inflater.decompress(content, _MOST)
                if not inflater.eof:
                    raise ValueError("it ends too soon, or is too large")
                ((kind, matrix),) = _elements(unpacked)
            if kind == _MATRIX and (array := _array(matrix, b"X")) is not None:
                return array
    except (struct.error, zlib.error, ValueError) as error:
        raise refusal(file, "not a readable MAT-file", error) from error
    raise refusal(file, "holds no array `X` of images")


def _elements(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, content) of the elements that follow one another. Raises ValueError for one that goes beyond the end."""
    view, at = memoryview(data), 0
    while at < len(view):
        kind, size = struct.unpack_from("<II", view, at)
        if kind >> 16:  # a small one: its size stands above its type, its content beside them
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            end = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(view):
            raise ValueError("it ends too soon")
        yield kind, view[start : start + size]
        at = end


def _array(matrix: memoryview, wanted: bytes) -> np.ndarray | None:
    """The images [32, 32, 3, N] by columns of a matrix of this name -> [N, 32, 32, 3]; None for another name."""
    parts = _elements(matrix)
    _, flags = next(parts)
    kind, dimensions = next(parts)
    _, name = next(parts)
    if bytes(name) != wanted:
        return None
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions) if kind == _INT32 else ()
    kind, pixels = next(parts)
    if len(shape) != 4 or shape[:3] != (SIDE, SIDE, 3) or kind not in (_UINT8, _INT8) or flags[1] & 8:
        raise ValueError(f"`X` is of shape {list(shape)}; bytes of [{SIDE}, {SIDE}, 3, N] are expected")
    array = np.frombuffer(pixels, np.uint8).reshape(shape, order="F")
    return np.ascontiguousarray(array.transpose(3, 0, 1, 2))
