"""Images in memory, and sources made of them, for the tests of preparing data."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def picture(height=24, width=24, seed=0):
    """A smooth colour image, uint8 [height, width, 3]: what JPEG and resizing keep."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).random(3) * 6
    return (127 + 60 * np.sin(x[..., None] / 7 + phase) + 60 * np.cos(y[..., None] / 5 + phase)).astype(np.uint8)


def encode(array, kind="PNG", **options):
    """An array, or an image of Pillow, as an encoded file's bytes."""
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def faces(count, start=1, folder="img_align_celeba/"):
    """{name: JPEG bytes} in CelebA's manner."""
    return {f"{folder}{n:06}.jpg": encode(picture(27, 22, n), "JPEG") for n in range(start, start + count)}


def write_zip(path, members, method=zipfile.ZIP_STORED):
    """members: {name: bytes}, or pairs of them where names repeat."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return path


def write_tar(path, members, mode="w"):
    """members: {name: bytes}, or pairs of (name or TarInfo, bytes)."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path, members):
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path
