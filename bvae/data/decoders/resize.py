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
from typing import Any

import numpy as np
from PIL import Image

from bvae.data.decoders.libraries import PILLOW_SIMD, native
from bvae.data.recipe import Filter, Size, both_sides

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SUPPORT: dict[Filter, int] = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
BAND = 512  # rows of a tall image that are resized at a time, not to hold it whole once more
LONGEST = 2**16  # sides whose taps are worth their memory; no JPEG is longer
FRACTION_BITS = 22  # bits in the weights' fraction, as in Pillow: 8 bits of pixel and 2 to spare for overshoot


def resize(image: Image.Image | np.ndarray, size: Size, filter: Filter, antialias: bool) -> np.ndarray:
    """An image, of mode L or RGB or uint8 [h, w, 3] -> uint8 [rows, columns] or [rows, columns, 3]; perhaps read-only.

    size: rows and columns of the result, or the number of both.
    """
    rows, columns = both_sides(size)
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    short = max(height, width) <= LONGEST
    if native is not None and short:
        grey = isinstance(image, Image.Image) and image.mode == "L"
        sides = [native_taps(n, m, filter, antialias) for n, m in ((width, columns), (height, rows))]
        resizer = native.Resizer(*sides, channels=1 if grey else 3)
        for band in _bands(image):
            resizer.add(band[..., None] if grey else band)
        result: np.ndarray = resizer.finish()
        return result[..., 0] if grey else result
    # pillow-simd has 16 bits for a weight, which Lanczos' lobes feel; Pillow 13 takes the columns of tall images first,
    # and decides by more than their height where the result is no square.
    first_columns = rows != columns or height - rows > max(0, 2 * (width - columns))
    differs = (PILLOW_SIMD and filter == "lanczos") or first_columns
    if (antialias or filter == "nearest") and not (differs and short):
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return np.asarray(picture.resize((columns, rows), RESAMPLING[filter]))
    shrunk = np.concatenate([_along_second(band, columns, filter, antialias) for band in _bands(image)])
    return np.ascontiguousarray(_along_second(shrunk.swapaxes(0, 1), rows, filter, antialias).swapaxes(0, 1))


def _bands(image: Image.Image | np.ndarray) -> Iterator[np.ndarray]:
    """The image's rows, as many at a time as BAND."""
    if isinstance(image, np.ndarray) or image.height <= BAND:
        yield np.asarray(image)
        return
    for top in range(0, image.height, BAND):
        yield np.asarray(image.crop((0, top, image.width, min(top + BAND, image.height))))


def kernel(filter: Filter, x: np.ndarray) -> np.ndarray:
    """f at distances x in input pixels, float64."""
    x = np.abs(x)
    if filter == "bilinear":
        return np.maximum(1 - x, 0)
    if filter == "bicubic":
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        return np.where(x < 1, near, np.where(x < 2, far, 0))
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


def taps(length: int, size: int, filter: Filter, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and weights from which each output pixel is made: (first, int32 [size]; weights, int32 [size, t]).

    Pixel first[i] + k weighs weights[i, k], in units of 2**-FRACTION_BITS. Where an output pixel has fewer than t,
    those left over weigh nothing and may lie beyond the image.
    """
    scale = length / size
    if filter == "nearest":  # summed up step by step, as Pillow does: c may fall on a pixel's border
        steps = np.full(size, scale)
        steps[0] = scale * 0.5
        first = np.add.accumulate(steps).astype(np.int32).clip(0, length - 1)
        return first, np.full((size, 1), 1 << FRACTION_BITS, np.int32)
    width = max(scale, 1.0) if antialias else 1.0
    support = SUPPORT[filter] * width
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), length)
    positions = first[:, None] + np.arange((end - first).max())
    weights = kernel(filter, (positions - centre[:, None] + 0.5) * (1 / width))
    weights[positions >= end[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    fixed = np.trunc(weights * 2**FRACTION_BITS + np.copysign(0.5, weights))
    return first.astype(np.int32), np.ascontiguousarray(fixed, np.int32)


@lru_cache(maxsize=64)  # the sides of a set's images are few, or one side's taps are little beside its decoding
def native_taps(length: int, size: int, filter: Filter, antialias: bool) -> Any:
    """`taps` as `bvae._image` takes them."""
    return native.Taps(length, *taps(length, size, filter, antialias))


def _along_second(pixels: np.ndarray, size: int, filter: Filter, antialias: bool) -> np.ndarray:
    """uint8 [h, w] or [h, w, C] -> uint8 [h, size(, C)]."""
    total = np.full((len(pixels), size, *pixels.shape[2:]), 1 << (FRACTION_BITS - 1), np.int32)
    first, weights = taps(pixels.shape[1], size, filter, antialias)
    for k, weight in enumerate(weights.T):
        pixel = pixels[:, np.minimum(first + k, pixels.shape[1] - 1)]
        total += pixel * (weight[:, None] if pixels.ndim == 3 else weight)
    return (total >> FRACTION_BITS).clip(0, 255).astype(np.uint8)
