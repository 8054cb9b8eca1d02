"""The recipe by which every decoder turns a picture into an array, and the types of its inputs and results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from bvae.errors import UserError

Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
Crop = int | Literal["square", "none", "exact"]
Size = int | tuple[int, int]  # a side, or (height, width)
MAX_SIZE = 2**14  # largest side of the result


class Rejected(Exception):
    """One image cannot be used. Its text is the reason, in one short line, without the image's name."""


class Item(Protocol):
    """One encoded image of a source: small enough to be sent to another process, which then reads the bytes."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes:
        """The encoded image. Raises Rejected where its bytes cannot be had."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an image of any size becomes uint8 [height, width, channels]; docs/backends.md defines each step.

    size: side of the result in pixels, or its (height, width); of two equal numbers one is kept.
    channels: 3 (RGB) or 1 (grey).
    crop: shorter side in pixels of the centred box of the result's aspect that is kept; "square", the largest such box,
        a square where the result is one; "none", all of the image, whose aspect is then lost; "exact", all of it, which
        must have the result's size already.
    filter: of the resize; see `bvae.data.decoders.resize`.
    antialias: widen the filter when the image shrinks, so that every pixel of the crop counts.

    Raises:
        UserError: for a value outside these.
    """

    size: Size
    channels: int
    crop: Crop = "square"
    filter: Filter = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        height, width = both_sides(self.size)
        object.__setattr__(self, "size", height if height == width else (height, width))
        if self.channels not in (1, 3):
            raise UserError(f"images have 1 or 3 channels, not {self.channels}")
        if not (self.crop in ("square", "none", "exact") or (isinstance(self.crop, int) and self.crop > 0)):
            raise UserError(f"the crop is a number of pixels, `square` or `none`, not {self.crop}")
        if self.filter not in FILTERS:
            raise UserError(f"the filter is one of {', '.join(FILTERS)}, not {self.filter}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the result."""
        return self.height, self.width, self.channels

    @property
    def height(self) -> int:
        return both_sides(self.size)[0]

    @property
    def width(self) -> int:
        return both_sides(self.size)[1]

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is kept of an image; an odd pixel left over goes right and down.

        Raises:
            Rejected: if the image is smaller than the crop, or of another size than is wanted exactly.
        """
        if self.crop == "exact" and (width, height) != (self.width, self.height):
            raise Rejected(f"is {width}x{height}, not {self.width}x{self.height}")
        if self.crop in ("none", "exact"):
            return 0, 0, width, height
        if self.crop == "square":
            kept_width = max(1, min(width, height * self.width // self.height))
            kept_height = max(1, min(height, width * self.height // self.width))
        else:
            assert isinstance(self.crop, int)
            shorter = min(self.height, self.width)
            kept_width, kept_height = (self.crop * length // shorter for length in (self.width, self.height))
        if kept_width > width or kept_height > height:
            crop = f"{self.crop}" if kept_width == kept_height else f"{kept_width}x{kept_height}"
            raise Rejected(f"is {width}x{height}, smaller than the crop of {crop}")
        left, top = (width - kept_width) // 2, (height - kept_height) // 2
        return left, top, left + kept_width, top + kept_height


def both_sides(size: Size) -> tuple[int, int]:
    """(height, width) of a side, or of the two. Raises UserError for what is no number of pixels within MAX_SIZE."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIZE for side in sides):
        raise UserError(f"the images' size must be from 1 to {MAX_SIZE}, or two such numbers (HxW), got {size}")
    return sides


def size_text(height: int, width: int) -> str:
    """A size as it is written on a command line: `64`, or `96x64` (height x width)."""
    return str(height) if height == width else f"{height}x{width}"


@dataclass
class Decoded:
    """The result of a chunk of items.

    pixels: uint8 [n, height, width, channels], the images kept, in the chunk's order.
    kept: their n positions in the chunk.
    rejected: (position, reason) of the others, in order.
    """

    pixels: np.ndarray
    kept: list[int]
    rejected: list[tuple[int, str]]


def collect(results: Sequence[np.ndarray | Rejected], recipe: Recipe) -> Decoded:
    """`Decoded` of a chunk's images and rejections, given in its order."""
    images = [(i, result) for i, result in enumerate(results) if not isinstance(result, Rejected)]
    pixels = np.empty((len(images), *recipe.shape), np.uint8)
    for row, (_, image) in enumerate(images):
        pixels[row] = image
    rejected = [(i, str(result)) for i, result in enumerate(results) if isinstance(result, Rejected)]
    return Decoded(pixels, [i for i, _ in images], rejected)
