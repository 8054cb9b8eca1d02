"""Sets of images as the command line names them: a folder, an archive, a store, CIFAR-10, .npy or .npz.

Nothing is resized, dropped or converted on the way: what cannot be used as it is, is refused by name.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from bvae.data import cifar, jpeg
from bvae.data.archive import Source, open_source
from bvae.data.arrays import read_npy
from bvae.data.decoders.pillow import FORMATS, MAX_PIXELS
from bvae.data.recipe import Rejected
from bvae.data.refusal import refusal
from bvae.errors import UserError
from bvae.metrics.protocols import quantise, stretch
from bvae.metrics.statistics import Statistics, holds_statistics, load_statistics

SPLITS = ("train", "val", "test")
IMAGE_KEYS = {"train": ("train", "x_train", "images"), "test": ("test", "x_test", "test_images"), "val": ("val",)}
READ = 500  # images at a time
GREY = "grey images, where the network expects colour: --grey repeats their channel, on both sides"


class Images:
    """A set of images of one size, in an order that does not change.

    name: for messages and results.
    n: how many.
    """

    name: str
    n: int
    _digest: str | None = None

    def first(self, count: int) -> "Images":
        """The first so many of them."""
        raise NotImplementedError

    def digest(self) -> str:
        """Of the pixels, or of the encoded files; reads everything once, and refuses what it finds unusable."""
        if self._digest is None:
            self._digest = self._read_all()
        return self._digest

    def _read_all(self) -> str:
        raise NotImplementedError

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        """uint8 [B,H,W,C] or float32 [B,C,H,W] in [0,1]; of each `ranks` batches the `rank`-th."""
        raise NotImplementedError


class ArrayImages(Images):
    """Of an array [N,H,W,C] or [N,H,W], perhaps mapped: uint8, or floats in [0,1]."""

    def __init__(self, array: np.ndarray, name: str, grey: bool = False) -> None:
        shape = list(array.shape)
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise UserError(f"{name}: holds {array.dtype} values; uint8 pixels, or floats in [0,1], are expected")
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or array.shape[3] not in (1, 3):
            hint = "; channels come last" if array.ndim == 4 and array.shape[1] in (1, 3) else ""
            raise UserError(f"{name}: has shape {shape}; [N,H,W,3] is expected{hint}")
        if 0 in array.shape:
            raise UserError(f"{name}: holds no images (shape {shape})")
        if array.shape[3] == 1 and not grey:
            raise UserError(f"{name}: {GREY}")
        self.array = array
        self.name = name
        self.n = len(array)

    def first(self, count: int) -> "ArrayImages":
        return ArrayImages(self.array[:count], self.name, grey=True)

    def _read_all(self) -> str:
        h = hashlib.sha256(f"array {self.array.dtype.str} {self.array.shape}".encode())
        for start in range(0, self.n, READ):
            part = np.ascontiguousarray(self.array[start : start + READ])
            if part.dtype != np.uint8:
                if not np.isfinite(part).all():
                    raise UserError(f"{self.name}: holds values that are not finite (NaN or infinite)")
                low, high = part.min(), part.max()
                if low < 0 or high > 1:
                    hint = "; pixels in 0..255 are given as uint8" if 1 < high <= 255 and low >= 0 else ""
                    raise UserError(f"{self.name}: floats must be in [0,1], found {low:g} to {high:g}{hint}")
            h.update(part.data)
        return f"sha256:{h.hexdigest()}"

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        for start in range(rank * READ, self.n, ranks * READ):
            part = np.array(self.array[start : start + READ])
            if part.dtype == np.uint8:
                yield torch.from_numpy(part)
            else:
                yield torch.from_numpy(part.astype(np.float32)).permute(0, 3, 1, 2)


class EncodedImages(Images):
    """Of a folder or an archive. Pixels as Pillow decodes them: first frame, no EXIF rotation, no transparency."""

    def __init__(self, source: Source, grey: bool = False, count: int | None = None) -> None:
        self.source = source
        self.grey = grey
        self.name = source.path
        self.n = len(source.items) if count is None else min(count, len(source.items))

    def first(self, count: int) -> "EncodedImages":
        return EncodedImages(self.source, self.grey, min(count, self.n))

    def _encoded(self) -> Iterator[tuple[int, str, bytes]]:
        for numbers, items in self.source.chunks(lambda number: number < self.n):
            for number, item in zip(numbers, items, strict=True):
                try:
                    yield number, item.name, item.read()
                except Rejected as error:
                    raise UserError(f"{self.name}: {item.name} {error}") from None

    def _read_all(self) -> str:
        h = hashlib.sha256(f"encoded {PIL.__version__}".encode())
        first: tuple[str, tuple[int, int]] | None = None
        for _, name, data in self._encoded():
            h.update(hashlib.sha256(data).digest())
            with self._open(name, data) as image:
                first = first or (name, image.size)
                if image.size != first[1]:
                    sizes = " and ".join(f"{width}x{height}" for width, height in (first[1], image.size))
                    raise UserError(
                        f"{self.name}: images of different sizes ({sizes}: {first[0]}, {name}); bring them to one "
                        "size first, since how that is done moves the FID"
                    )
        return f"sha256:{h.hexdigest()}"

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        batch: list[np.ndarray] = []
        for place, (_, name, data) in enumerate(self._encoded()):
            if (place // READ) % ranks != rank:
                continue
            batch.append(self._decode(name, data))
            if len(batch) == READ:
                yield torch.from_numpy(np.stack(batch))
                batch = []
        if batch:
            yield torch.from_numpy(np.stack(batch))

    def _open(self, name: str, data: bytes) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on odd metadata and large images: what matters is raised
            try:
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            except Exception as error:
                raise refusal(self.name, f"{name} is not a readable image", error) from error
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{self.name}: {name} has more than the {MAX_PIXELS} pixels accepted")
        if image.mode[0] in "IF":
            raise UserError(f"{self.name}: {name} is deeper than 8 bits a channel; convert it to 8")
        if image.mode in ("1", "L", "LA") and not self.grey:
            raise UserError(f"{self.name}: {name}: {GREY}")
        return image

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        with self._open(name, data) as image:
            try:
                return np.asarray(image.convert("RGB"))
            except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
                raise refusal(self.name, f"{name} cannot be decoded", error) from error


class ChangedImages(Images):
    """A set after a round trip through JPEG, or stretched (`bvae.metrics.protocols.stretch`)."""

    def __init__(self, images: Images, through_jpeg: bool, stretched: bool) -> None:
        self.images, self.through_jpeg, self.stretched = images, through_jpeg, stretched
        self.name, self.n = images.name, images.n

    def first(self, count: int) -> "ChangedImages":
        return ChangedImages(self.images.first(count), self.through_jpeg, self.stretched)

    def _read_all(self) -> str:
        return self.images.digest()  # what was done stands in the protocol's name

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        for batch in self.images.batches(rank, ranks):
            if self.through_jpeg:
                batch = torch.from_numpy(jpeg.roundtrip(quantise(batch).numpy()))
            yield stretch(batch) if self.stretched else batch


def open_images(text: str, grey: bool = False) -> Images | Statistics:
    """What lies at a path, which may end in `:train`, `:val` or `:test` where there are splits; test is the default.

    Raises UserError, in one line that names the path, for what is no set of images and no statistics.
    """
    path, split = _split_of(text)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise refusal(repr(text), "not a usable path", error) from error
    if is_folder and (batches := cifar.find_folder(path)):
        train, test = cifar.read_folder(batches)
        return ArrayImages(_one_of({"train": train, "test": test}, split, path), f"{path}:{split or 'test'}")
    if is_folder and (path / "test.npy").exists():
        array = path / f"{split or 'test'}.npy"
        if not array.is_file():
            raise refusal(path, f"a prepared store without {array.name}")
        return ArrayImages(read_npy(array), str(array), grey)
    if is_file and path.suffix.lower() == ".npy":
        return ArrayImages(read_npy(_whole(path, split)), str(path), grey)
    if is_file and path.suffix.lower() == ".npz":
        return _open_npz(path, split, grey)
    if is_file and path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth"):
        raise refusal(path, "a pickle, which could run code, is not opened: give images, or statistics as .npz")
    return EncodedImages(open_source(_whole(path, split)), grey)


def _split_of(text: str) -> tuple[Path, str | None]:
    head, _, tail = text.rpartition(":")
    return (Path(head), tail) if head and tail in SPLITS and not Path(text).exists() else (Path(text), None)


def _whole(path: Path, split: str | None) -> Path:
    if split is not None:
        raise refusal(path, f"has no splits to take {split} of")
    return path


def _one_of(parts: dict[str, np.ndarray], split: str | None, path: Path) -> np.ndarray:
    if (split or "test") not in parts:
        raise refusal(path, f"has no {split}, only {' and '.join(parts)}")
    return parts[split or "test"]


def _open_npz(path: Path, split: str | None, grey: bool) -> Images | Statistics:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if holds_statistics(names):
                return load_statistics(_whole(path, split))[0]
            wanted = [key for key in IMAGE_KEYS[split] if key in names] if split else []
            if not split:
                known = [key for kind in ("test", "train") for key in IMAGE_KEYS[kind] if key in names]
                wanted = known[:1] or (names if len(names) == 1 else [])
            if not wanted:
                found = ", ".join(names[:8]) or "none"
                raise refusal(path, f"which array? Expected {split or 'images or a single array'}, found: {found}")
            array = archive[wanted[0]]
    except (UserError, MemoryError):
        raise
    except Exception as error:  # NumPy and zipfile report damage in many ways
        raise refusal(path, "not a readable NumPy archive", error) from error
    if not isinstance(array, np.ndarray):
        raise refusal(f"{path}[{wanted[0]}]", "not an array")
    return ArrayImages(array, f"{path}[{wanted[0]}]", grey)
