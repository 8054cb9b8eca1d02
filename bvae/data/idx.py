"""MNIST and Fashion-MNIST in their official form: idx files, compressed or not.

Format: http://yann.lecun.com/exdb/mnist/. Images of 28x28 are padded with zeros to 32x32, a power of
two, unless a side of 28 is asked for.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from bvae.data.recipe import Size, both_sides, size_text
from bvae.data.refusal import refusal
from bvae.errors import UserError

SIDE = 28
PADDED = 32
SIDES = (SIDE, PADDED)  # possible sides
FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # torchvision keeps them in the latter
_STEMS = ("train-images", "t10k-images")
_KINDS = ("-idx3-ubyte", ".idx3-ubyte")
_MAGIC = (2051).to_bytes(4, "big")  # unsigned bytes, three dimensions
_MOST = 2**24  # images


def find(folder: Path) -> tuple[Path, Path] | None:
    """The files of training and test images in a folder, or None if neither is there.

    Raises:
        UserError: if one of them is missing.
    """
    for inner in FOLDERS:
        files = [_find_file(folder / inner, stem) for stem in _STEMS]
        if any(files):
            for stem, file in zip(_STEMS, files, strict=True):
                if file is None:
                    raise refusal(folder / inner, f"this set is incomplete: {stem}-idx3-ubyte.gz is missing")
            return files[0], files[1]  # type: ignore[return-value]
    return None


def edge(size: Size) -> int:
    """Zeros on each side of a 28x28 image in one of this size. Raises UserError for a size that cannot be had."""
    if size not in SIDES:
        asked = size_text(*both_sides(size))
        raise UserError(f"idx files hold images of {SIDE}x{SIDE}, padded to {PADDED}x{PADDED} on request, not {asked}")
    return (both_sides(size)[0] - SIDE) // 2


def read(path: Path, padding: int = 0) -> np.ndarray:
    """The images of one file with `padding` zeros on each side, uint8 [N, 28 + 2 padding, 28 + 2 padding, 1].

    Raises:
        UserError: if it cannot be read, or is not an idx file of 28x28 images.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(16)
            count, height, width = (int.from_bytes(header[i : i + 4], "big") for i in (4, 8, 12))
            if len(header) < 16 or header[:4] != _MAGIC:
                raise refusal(path, "not an idx file of images")
            if (height, width) != (SIDE, SIDE):
                raise refusal(path, f"holds images of {height}x{width}; {SIDE}x{SIDE} is expected")
            if not 0 < count <= _MOST:
                raise refusal(path, f"holds {count} images; from 1 to {_MOST} are expected")
            data = file.read(count * SIDE**2 + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise refusal(path, "cannot be read", error) from error
    if len(data) != count * SIDE**2:
        raise refusal(path, f"has not the {count * SIDE**2} pixels of the {count} images it announces")
    images = np.frombuffer(data, np.uint8).reshape(count, SIDE, SIDE, 1)
    return np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _find_file(folder: Path, stem: str) -> Path | None:
    for kind in _KINDS:
        for packed in (".gz", ""):
            file = folder / f"{stem}{kind}{packed}"
            if file.is_file():
                return file
    return None
