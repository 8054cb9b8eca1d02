"""Folders of image files, and the JPEG round trip of the papers' protocol; both are Pillow's work."""

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bvae.data.refusal import refusal
from bvae.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif")
# Whatever its suffix, a file of another format is refused: some of Pillow's decoders start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 2**26  # of one file, 8192 x 8192: a small file can claim to be far larger and fill the memory


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
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise refusal(path, f"is {image.width}x{image.height}, more than the {MAX_PIXELS} pixels accepted")
            if image.mode[0] in "IF":
                raise refusal(path, f"is deeper than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8")
            upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except UserError:
        raise
    except Exception as error:
        raise refusal(path, "not a readable image", error) from error
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
    result = np.empty_like(images)
    for row, image in enumerate(images):  # threads would slow this down: most of it is Pillow's Python
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "JPEG")
        result[row] = np.asarray(Image.open(buffer, formats=("JPEG",))).reshape(image.shape)
    return result


def _read_below(folder: Path, side: int, channels: int) -> np.ndarray:
    files = list_images(folder)
    if not files:
        raise refusal(folder, f"holds no images ({', '.join(SUFFIXES)})")
    images = np.empty((len(files), side, side, channels), np.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # of Pillow, on odd metadata and large images: what matters is raised
        for row, image in enumerate(pool.map(lambda file: read_image(file, side, channels), files)):
            images[row] = image
    return images


def _unreadable(error: OSError) -> None:
    raise refusal(error.filename, "cannot be read", error) from error
