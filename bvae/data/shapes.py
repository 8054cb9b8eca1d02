"""Shapes: a small generated data set whose true factors of variation are known.

An image shows one, two or three equal copies of one shape on a plain background and is a pure function of eight
numbers (`render`). The factors are drawn independently of each other and uniformly over `RANGES`.
"""

import math

import numpy as np

from bvae.errors import UserError

KINDS = ("disc", "square", "triangle", "cross")

# In the order of the columns. Lengths are fractions of the side, angles radians, hue a fraction of the colour circle,
# background a grey level; (x, y) = (0, 0) is the top left corner. `number` and `kind` take every integer of their
# range. Rotation stays within a quarter turn, the period of square and cross, so that no two angles draw one image.
RANGES = {
    "number": (1.0, 3.0),
    "kind": (0.0, len(KINDS) - 1.0),
    "x": (0.38, 0.62),
    "y": (0.38, 0.62),
    "size": (0.22, 0.32),
    "rotation": (0.0, math.pi / 2),
    "hue": (0.0, 1.0),
    "background": (0.0, 0.5),
}
NAMES = tuple(RANGES)
DISCRETE = ("number", "kind")
# The measure of correlation for each factor (`bvae.metrics.latent.factor_correlation`); a number is a period.
FACTOR_TYPES = ("linear", "categorical", "linear", "linear", "linear", math.pi / 2, 1.0, "linear")

SATURATION = 0.9
# number -> (distance of the copies from the centre, radius of a copy), in units of `size`: copies never touch, and with
# x, y and size in their ranges no part of one leaves the image.
LAYOUT = {1: (0.0, 1.0), 2: (0.58, 0.57), 3: (0.63, 0.52)}

_PIXELS_AT_ONCE = 2**17  # keeps a block's temporaries in the cache


def make_shapes(num: int, side: int, seed: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw factors and render them.

    The draw depends on `seed` and `stream` alone, one row after the other: a larger `num` begins with the images of a
    smaller one. Different streams of one seed are independent (train and test of `bvae.data.load`).

    Args:
        num: how many images, 0 or more.
        side: height and width in pixels, a power of two, at least 16.
        seed: 0 or more.
        stream: 0 or more.

    Returns:
        images, uint8 [num, side, side, 3], and factors, float32 [num, 8], columns as in `NAMES`.

    Raises:
        UserError: for a side, number or seed out of range.
    """
    if num < 0:
        raise UserError(f"shapes: the number of images must not be negative, got {num}")
    if seed < 0:
        raise UserError(f"shapes: the seed must not be negative, got {seed}")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream,)))
    uniform = rng.random((num, len(NAMES)))
    factors = np.empty((num, len(NAMES)), np.float32)
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        if name in DISCRETE:
            factors[:, column] = low + np.floor(uniform[:, column] * (high - low + 1))
        else:
            factors[:, column] = low + uniform[:, column] * (high - low)
    return render(factors, side), factors


def render(factors: np.ndarray, side: int) -> np.ndarray:
    """Draw the images that belong to given factors.

    Continuous factors may leave the ranges that `make_shapes` draws from; hue is periodic.

    Args:
        factors: [N, 8], columns as in `NAMES`.
        side: height and width in pixels, a power of two, at least 16.

    Returns:
        uint8 [N, side, side, 3], RGB.

    Raises:
        UserError: for a side that is no power of two or is below 16.
        ValueError: for factors of another shape, not finite, or with a number or kind that does not exist.
    """
    if side < 16 or side & (side - 1):
        raise UserError(f"shapes: the side must be a power of two, at least 16, got {side}: change --side")
    # float64 from here on: another machine's sin and cos may differ in the last bit, which then practically never
    # decides how a pixel is rounded.
    factors = np.asarray(factors, np.float64)
    if factors.ndim != 2 or factors.shape[1] != len(NAMES):
        raise ValueError(f"factors must be [N, {len(NAMES)}], got {list(factors.shape)}")
    if not np.isfinite(factors).all():
        raise ValueError("factors must be finite")
    if not np.isin(factors[:, 0], list(LAYOUT)).all():
        raise ValueError(f"number must be one of {sorted(LAYOUT)}")
    if not np.isin(factors[:, 1], range(len(KINDS))).all():
        raise ValueError(f"kind must be one of 0..{len(KINDS) - 1}")

    images = np.empty((len(factors), side, side, 3), np.uint8)
    step = max(1, _PIXELS_AT_ONCE // side**2)
    for number in LAYOUT:
        for kind in range(len(KINDS)):
            rows = np.flatnonzero((factors[:, 0] == number) & (factors[:, 1] == kind))
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                images[block] = _render_block(number, KINDS[kind], factors[block], side)
    return images


def _render_block(number: int, kind: str, factors: np.ndarray, side: int) -> np.ndarray:
    """Images of one number and kind: float64 [n, 8] -> uint8 [n, side, side, 3]."""
    x, y, size, rotation, hue, background = (factors[:, i, None, None] for i in range(2, 8))
    centres = (np.arange(side) + 0.5) / side
    ring, radius = (unit * size for unit in LAYOUT[number])
    cos, sin = np.cos(rotation), np.sin(rotation)
    distance = np.full((len(factors), side, side), np.inf)
    for copy in range(number):
        angle = rotation + 2 * math.pi * copy / number  # 0 is up, and the angle grows clockwise
        dx = centres[None, None, :] - (x + ring * np.sin(angle))
        dy = centres[None, :, None] - (y - ring * np.cos(angle))
        # The pixel in the copy's own axes, u to its right and v down.
        np.minimum(distance, _distance(kind, cos * dx + sin * dy, cos * dy - sin * dx, radius), out=distance)
    # A pixel is covered by as much of itself as lies inside an edge that passes at this distance.
    coverage = np.clip(0.5 - distance * side, 0.0, 1.0)[..., None]
    colour = _hue_to_rgb(hue)
    level = background[..., None]
    return np.floor((level + coverage * (colour - level)) * 255 + 0.5).astype(np.uint8)


def _distance(kind: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside; outside a corner that of the nearest edge's line, which keeps
    corners sharp. The proportions make the four kinds about equally heavy to the eye within one radius."""
    if kind == "disc":
        return np.sqrt(u * u + v * v) - 0.86 * radius
    if kind == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.72 * radius
    if kind == "triangle":
        slanted = np.abs(u) * (math.sqrt(3) / 2) - v / 2
        return np.maximum(slanted, v) - 0.52 * radius
    long, wide = 0.9 * radius, 0.3 * radius
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - long, v - wide), np.maximum(u - wide, v - long))


def _hue_to_rgb(hue: np.ndarray) -> np.ndarray:
    """HSV to RGB at full value: [...] -> [..., 3] in [0, 1]."""
    k = np.mod(np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None], 6)
    return 1 - SATURATION * np.clip(np.minimum(k, 4 - k), 0, 1)
