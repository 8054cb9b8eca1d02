"""MNIST and Fashion-MNIST in their official form: idx files, compressed or not.

Format: http://yann.lecun.com/exdb/mnist/. Images of 28x28 are padded with zeros to 32x32, a power of two.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from bvae.data.refusal import refusal

SIDE = 32
FOLDERS = ("", "raw", "MNIST/raw", "FashionMNIST/raw")  # torchvision keeps them in the latter
_STEMS = ("train-images", "t10k-images")
_KINDS = ("-idx3-ubyte", ".idx3-ubyte")
_MAGIC = (2051).to_bytes(4, "big")  # unsigned bytes, three dimensions
_SQUARE = 28
EDGE = (SIDE - _SQUARE) // 2  # zeros on each side
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


def read(path: Path) -> np.ndarray:
    """The images of one file, uint8 [N, 32, 32, 1].

    Raises:
        UserError: if it cannot be read, or is not an idx file of 28x28 images.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(16)
            count, height, width = (int.from_bytes(header[i : i + 4], "big") for i in (4, 8, 12))
            if len(header) < 16 or header[:4] != _MAGIC:
                raise refusal(path, "not an idx file of images")
            if (height, width) != (_SQUARE, _SQUARE):
                raise refusal(path, f"holds images of {height}x{width}; {_SQUARE}x{_SQUARE} is expected")
            if not 0 < count <= _MOST:
                raise refusal(path, f"holds {count} images; from 1 to {_MOST} are expected")
            data = file.read(count * _SQUARE**2 + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise refusal(path, "cannot be read", error) from error
    if len(data) != count * _SQUARE**2:
        raise refusal(path, f"has not the {count * _SQUARE**2} pixels of the {count} images it announces")
    images = np.frombuffer(data, np.uint8).reshape(count, _SQUARE, _SQUARE, 1)
    return np.pad(images, ((0, 0), (EDGE, EDGE), (EDGE, EDGE), (0, 0)))


def _find_file(folder: Path, stem: str) -> Path | None:
    for kind in _KINDS:
        for packed in (".gz", ""):
            file = folder / f"{stem}{kind}{packed}"
            if file.is_file():
                return file
    return None
