"""Folders of image files, and the JPEG round trip of the papers' protocol; both are Pillow's work."""

import io
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from bvae.data.refusal import refusal

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif")
MAX_PIXELS = 2**26  # of one file, 8192 x 8192: a small file can claim to be far larger and fill the memory

_Item = TypeVar("_Item")


def read_image_folder(folder: Path, side: int, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(train, test) of a folder of images: from its sub-folders `train` and `test` if there is a `train`, otherwise
    everything below it is train. Without images for test, test is None."""
    if not (folder / "train").is_dir():
        return _read_below(folder, side, channels), None
    train = _read_below(folder / "train", side, channels)
    if not (folder / "test").is_dir():
        return train, None
    return train, _read_below(folder / "test", side, channels)


def list_images(folder: Path) -> list[Path]:
    """Image files anywhere below a folder, by suffix, sorted by their path; hidden files and folders are left out."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def read_image(path: Path, side: int, channels: int) -> np.ndarray:
    """One image file -> uint8 [side, side, channels].

    In this order: EXIF orientation; RGB or, for one channel, L (transparency is dropped); the largest centred square;
    Pillow's bilinear resize, which antialiases.

    Raises:
        UserError: naming the file, if it cannot be decoded, is deeper than 8 bits or has more than 2**26 pixels.
    """
    # Pillow's plugins raise nearly anything on damaged files (OSError, SyntaxError, struct.error, ...).
    try:
        with Image.open(path) as image:
            pixels, mode = image.width * image.height, image.mode
            if pixels <= MAX_PIXELS and mode[0] not in "IF":
                upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except Exception as error:
        raise refusal(path, "not a readable image", error) from error
    if pixels > MAX_PIXELS:
        raise refusal(path, f"has {pixels} pixels, more than the {MAX_PIXELS} that are accepted")
    if mode[0] in "IF":
        raise refusal(path, f"has more than 8 bits a channel (Pillow's mode {mode}); convert it to 8 bits")
    edge = min(upright.size)
    left, top = (upright.width - edge) // 2, (upright.height - edge) // 2
    square = upright.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square).reshape(side, side, channels)


def jpeg_roundtrip(images: np.ndarray) -> np.ndarray:
    """Every image through JPEG with Pillow's defaults (quality 75, 4:2:0), as the reference codes store CIFAR-10.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3.

    Returns:
        uint8 [N, H, W, C], a new array.
    """
    return _stack(_through_jpeg, images, images.shape)


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "JPEG")
    return np.asarray(Image.open(buffer)).reshape(image.shape)


def _read_below(folder: Path, side: int, channels: int) -> np.ndarray:
    files = list_images(folder)
    if not files:
        raise refusal(folder, f"holds no images ({', '.join(SUFFIXES)})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on odd metadata and large images: what matters is raised
        return _stack(lambda file: read_image(file, side, channels), files, (len(files), side, side, channels))


def _stack(function: Callable[[_Item], np.ndarray], items: Iterable[_Item], shape: tuple[int, ...]) -> np.ndarray:
    """function(item) of every item, in one array. Threads help, since Pillow lets go of the lock to code and resize."""
    result = np.empty(shape, np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, image in enumerate(pool.map(function, items)):
            result[row] = image
    return result


def _unreadable(error: OSError) -> None:
    raise refusal(error.filename, "cannot be read", error) from error
