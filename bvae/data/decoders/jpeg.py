"""JPEG's headers, as far as they tell who can decode a file to the same pixels, and how much of it must be decoded; and
the decoding of such files.
"""

from dataclasses import dataclass

import numpy as np

from bvae.data.decoders.libraries import jpeg_version, native
from bvae.data.decoders.resize import native_taps
from bvae.data.recipe import Recipe

END = b"\xff\xd9"
SEQUENTIAL = (0xC0, 0xC1)  # Huffman coded: baseline, extended
PROGRESSIVE = 0xC2
STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
SUBSAMPLING = ((1, 1), (2, 1), (2, 2))  # 4:4:4, 4:2:2, 4:2:0


@dataclass(frozen=True)
class Header:
    """Facts that a JPEG file states of itself before its first scan.

    width, height: in pixels.
    height_at: where the height's two bytes lie in the file.
    sequential: true if it is Huffman coded and not progressive.
    one_scan: true if the first scan has all components; a sequential file then has no other.
    sampling: (horizontal, vertical) factors of each component.
    plain: 8-bit grey or YCbCr in 4:4:4, 4:2:2 or 4:2:0, with no metadata that could turn it, to its end: a file that
        every decoder reads in the same way.
    """

    width: int
    height: int
    height_at: int
    sequential: bool
    one_scan: bool
    sampling: tuple[tuple[int, int], ...]
    plain: bool


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG file, or None: not a JPEG, damaged, or of a rare kind (lossless, arithmetic coding, ...)."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    frame: tuple[int, int] | None = None  # marker and position of the SOF segment
    adobe = metadata = False
    try:
        while True:
            if data[at] != 0xFF:
                return None
            marker = data[at + 1]
            if marker == 0xFF:  # fill bytes
                at += 1
                continue
            if marker in STANDALONE:
                return None
            length = (data[at + 2] << 8) + data[at + 3]
            if marker in SEQUENTIAL or marker == PROGRESSIVE:
                if frame is not None:
                    return None
                frame = marker, at
            elif marker == 0xDA:
                break
            elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8):
                return None
            elif marker == 0xE1:
                metadata = True  # EXIF or XMP
            elif marker == 0xEE:
                adobe = True
            at += 2 + length
        if frame is None:
            return None
        kind, start = frame
        precision, components = data[start + 4], data[start + 9]
        ids = tuple(data[start + 10 : start + 10 + 3 * components : 3])
        sampling = tuple((data[i] >> 4, data[i] & 15) for i in range(start + 11, start + 10 + 3 * components, 3))
        scanned = data[at + 4]
    except IndexError:
        return None
    width, height = int.from_bytes(data[start + 7 : start + 9]), int.from_bytes(data[start + 5 : start + 7])
    grey = components == 1
    colour = ids == (1, 2, 3) and sampling[0] in SUBSAMPLING and sampling[1:] == ((1, 1), (1, 1))
    return Header(
        width=width,
        height=height,
        height_at=start + 5,
        sequential=kind in SEQUENTIAL,
        one_scan=scanned == components,
        sampling=sampling,
        plain=precision == 8
        and (grey or colour)
        and not (adobe or metadata)
        and width > 0
        and height > 0
        and data.endswith(END),
    )


def decode_plain(data: bytes, header: Header, recipe: Recipe) -> np.ndarray | None:
    """The crop of a plain JPEG, resized: uint8 [height, width, channels], as Pillow and `resize` would make it.

    By libjpeg-turbo directly, row after row: nothing but one row of the image is held. None where it cannot be told
    that Pillow would give the same: bvae was built without libjpeg-turbo, the file is damaged above the crop's end, or
    colour is to become grey.

    Raises:
        Rejected: if the image is smaller than the crop.
    """
    grey = len(header.sampling) == 1
    if jpeg_version() is None or (recipe.channels == 1 and not grey):
        return None
    left, top, right, bottom = recipe.box(header.width, header.height)
    columns, rows = (
        native_taps(length, size, recipe.filter, recipe.antialias)
        for length, size in ((right - left, recipe.width), (bottom - top, recipe.height))
    )
    return native.decode_jpeg(data, header.width, header.height, left, top, recipe.channels, columns, rows)


def keep_rows(data: bytes, header: Header, bottom: int) -> bytes:
    """The file, made to claim no more rows than are needed for the pixels above `bottom` to come out as they are.

    A decoder then stops there, and takes what follows for bytes between the picture and the end marker, which it
    skips. The file is returned as it is where this cannot be done or spares nothing.
    """
    if not (header.plain and header.sequential and header.one_scan):
        return data
    # Whole blocks, and one row more than asked for: chroma is interpolated between rows.
    block = 8 * max(vertical for _, vertical in header.sampling)
    rows = -(-(bottom + 1) // block) * block
    if rows >= header.height:
        return data
    return data[: header.height_at] + rows.to_bytes(2) + data[header.height_at + 2 :]
