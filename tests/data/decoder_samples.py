"""Images, files and items that the decoders' tests share."""

import io
import os
import signal
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bvae.data.recipe import Rejected


@dataclass
class Held:
    """An item that holds its bytes."""

    name: str
    data: bytes

    def read(self):
        return self.data


class Unreadable(Held):
    def read(self):
        raise Rejected("is encrypted")


class Deadly(Held):
    """Ends the process that reads it."""

    def read(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Buggy(Held):
    def read(self):
        raise ValueError("a bug")


def picture(height=96, width=80, seed=0):
    """Colour, uint8 [height, width, 3]: smooth, with some texture and hard edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.random(3) * 6
    image = 127 + 60 * np.sin(x[..., None] / 7 + phase) + 60 * np.cos(y[..., None] / 5 + phase)
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def encode(image, format="JPEG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows):
    """A PNG file from its raw rows, as Pillow would not write it. colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def mixed_items(count=40):
    """Good images of several kinds and sizes, and some of everything that goes wrong."""
    items = []
    for i in range(count):
        image = picture(64 + i % 7, 64 + i % 5, i)
        kind = i % 10
        if kind == 0:
            data = encode(image, "PNG")
        elif kind == 1:
            data = encode(image)[:-300]
        elif kind == 2:
            data = b"text"
        elif kind == 3:
            data = encode(Image.fromarray(image).convert("CMYK"))
        elif kind == 4:
            data = encode(image, progressive=True)
        else:
            data = encode(image, subsampling=i % 3, quality=60 + i % 30)
        items.append((Unreadable if i == count - 5 else Held)(f"{i}.jpg", data))
    return items
