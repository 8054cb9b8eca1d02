"""The resize, exactly: Pillow's where a shrinking image is antialiased, its filters without their widening where not.

With lengths n and m of a side before and after and s = n/m, the output pixel i lies at c = (i + 1/2) s, where the
input's pixel j lies at j + 1/2. Its value is the sum of the input's pixels weighted with

    f((j + 1/2 - c) / max(s, 1))    with antialias
    f( j + 1/2 - c)                 without

the weights of pixels inside the image (the crop) made to sum to one: nothing is imagined beyond the edge. f is the
triangle (bilinear), the cubic with a = -1/2 (bicubic) or Lanczos' kernel with three lobes. First along the rows, then
along the columns, each rounded to 8 bits. `nearest` takes the input pixel that c lies in; antialias does not touch it.
An image that grows has s < 1, and both ways are one.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

from bvae.data.recipe import Filter

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SUPPORT: dict[Filter, int] = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
BAND = 512  # rows of a tall image that are resized at a time, not to hold it whole once more
FRACTION_BITS = 22  # of the weights, as Pillow's: 8 bits of pixel and 2 to spare for overshoot


def resize(image: Image.Image, size: int, filter: Filter, antialias: bool) -> np.ndarray:
    """An image of mode L or RGB -> uint8 [size, size] or [size, size, 3]; a new array or a read-only view."""
    if antialias or filter == "nearest":
        return np.asarray(image.resize((size, size), RESAMPLING[filter]))
    rows = np.concatenate([_along_second(band, size, filter) for band in _bands(image)])
    return np.ascontiguousarray(_along_second(rows.swapaxes(0, 1), size, filter).swapaxes(0, 1))


def _bands(image: Image.Image) -> Iterator[np.ndarray]:
    for top in range(0, image.height, BAND):
        whole = image.height <= BAND
        yield np.asarray(image if whole else image.crop((0, top, image.width, min(top + BAND, image.height))))


def kernel(filter: Filter, x: np.ndarray) -> np.ndarray:
    """f at distances x in input pixels, float64."""
    x = np.abs(x)
    if filter == "bilinear":
        return np.maximum(1 - x, 0)
    if filter == "bicubic":
        near = (1.5 * x - 2.5) * x**2 + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


@lru_cache(maxsize=256)  # the sides of a set's images are few, or one side's taps are little beside its decoding
def taps(length: int, size: int, filter: Filter) -> tuple[np.ndarray, np.ndarray]:
    """(positions, weights) without antialias, both int32 [t, size]: what each output pixel takes from where.

    Weights are in units of 2**-FRACTION_BITS; where an output pixel has fewer taps, those left over weigh nothing.
    """
    support = SUPPORT[filter]
    centre = (np.arange(size) + 0.5) * (length / size)
    first = np.floor(centre - support + 0.5).astype(np.int64)
    positions = first + np.arange(2 * support + 1)[:, None]
    weights = kernel(filter, positions + 0.5 - centre)
    weights[(positions < 0) | (positions >= length)] = 0
    weights /= weights.sum(0)
    used = weights.any(1)
    fixed = np.floor(weights * 2**FRACTION_BITS + 0.5)
    return positions.clip(0, length - 1).astype(np.int32)[used], fixed.astype(np.int32)[used]


def _along_second(pixels: np.ndarray, size: int, filter: Filter) -> np.ndarray:
    """uint8 [h, w] or [h, w, C] -> uint8 [h, size(, C)]."""
    total = np.full((len(pixels), size, *pixels.shape[2:]), 1 << (FRACTION_BITS - 1), np.int32)
    for position, weight in zip(*taps(pixels.shape[1], size, filter), strict=True):
        total += pixels[:, position] * (weight[:, None] if pixels.ndim == 3 else weight)
    return (total >> FRACTION_BITS).clip(0, 255).astype(np.uint8)
