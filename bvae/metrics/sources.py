"""Sets of images as the command line names them: a folder, an archive, a store, a known data set, .npy or .npz.

Encoded images become pixels by the rules of preparing (docs/backends.md), and by its decoder. Nothing is resized or
dropped on the way: what cannot be used as it is, is refused by name.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from bvae.data import arrays, idx, jpeg, kinds, named, svhn
from bvae.data.archive import ARCHIVES, CHUNK_IMAGES, Source, check_stamp, open_source, stamp
from bvae.data.decoders import open_decoder
from bvae.data.decoders.pillow import inspect_image, quiet
from bvae.data.recipe import Item, Recipe, Rejected
from bvae.data.refusal import refusal
from bvae.data.splits import SPLITS, named_splits
from bvae.errors import UserError
from bvae.metrics.protocols import quantise, stretch
from bvae.metrics.statistics import Statistics, holds_statistics, load_statistics

NAMES = (*SPLITS, "extra", "unlabeled")  # names of splits, after a colon
READ = 500  # images at a time; fewer where their pixels would take more than READ_BYTES
READ_BYTES = 2**27  # bytes of pixels at a time
CHUNK_BYTES = 2**23  # bytes in one piece of work for a decoder
KEPT_BYTES = 2**28  # bytes of decoded pixels that are kept from checking to measuring
FEW_IMAGES = 500  # decoded before worker processes would have started
ROUNDING = 1e-5  # distance by which floats may lie outside [0,1]; they are clipped
GREY = "grey images, where the network expects colour: --grey repeats their channel, on both sides"


class Images:
    """A set of images of one size, in an order that does not change.

    name: for messages and results.
    n: how many.
    size: (height, width) of each; of encoded images known once they were read, by `digest`.
    notes: lines for the user: what the source holds that is not among them.
    """

    name: str
    n: int
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    _digest: str | None = None

    def first(self, count: int) -> "Images":
        """The first `count` of them."""
        raise NotImplementedError

    def digest(self) -> str:
        """Digest of the pixels, or of the encoded files. Reads everything once, and refuses unusable images."""
        if self._digest is None:
            self._digest = self._read_all()
        return self._digest

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        """Refuses what can only be found by decoding it, of the batches that `batches` gives this rank."""

    def _read_all(self) -> str:
        raise NotImplementedError

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        """uint8 [B,H,W,C] or float32 [B,C,H,W] in [0,1]; batches rank, rank + ranks, rank + 2 ranks and so on."""
        raise NotImplementedError


class ArrayImages(Images):
    """Images of an array [N,H,W,C] or [N,H,W], perhaps mapped: uint8, or floats in [0,1]."""

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
        self.size = array.shape[1], array.shape[2]
        self.rows = max(1, min(READ, READ_BYTES // (array.itemsize * math.prod(array.shape[1:]))))
        self._file: Path | None = getattr(array, "filename", None)
        self._stamp = stamp(os.stat(self._file)) if self._file else None

    def first(self, count: int) -> "ArrayImages":
        some = ArrayImages(self.array[:count], self.name, grey=True)
        some.notes = self.notes
        return some

    def _check_unchanged(self) -> None:
        if self._file is not None and self._stamp is not None:
            there = os.path.exists(self._file)
            check_stamp(str(self._file), self._stamp, os.stat(self._file) if there else None)

    def _read_all(self) -> str:
        h = hashlib.sha256(f"array {self.array.dtype.str} {self.array.shape}".encode())
        for start in range(0, self.n, self.rows):
            part = np.ascontiguousarray(self.array[start : start + self.rows])
            if part.dtype != np.uint8:
                self._check_range(part)
            h.update(part.data)
        self._check_unchanged()
        return f"sha256:{h.hexdigest()}"

    def _check_range(self, part: np.ndarray) -> None:
        if not np.isfinite(part).all():
            raise UserError(f"{self.name}: holds values that are not finite (NaN or infinite)")
        low, high = float(part.min()), float(part.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            hint = ""
            if 2 <= high <= 255 and low >= 0:
                hint = "; pixels in 0..255 are given as uint8"
            elif -1 - ROUNDING <= low < 0 and high <= 1 + ROUNDING:
                hint = "; those in [-1,1] are brought there by (x + 1) / 2"
            raise UserError(f"{self.name}: floats must be in [0,1], found {low:.9g} to {high:.9g}{hint}")

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        for start in range(rank * self.rows, self.n, ranks * self.rows):
            part = np.array(self.array[start : start + self.rows])
            if part.dtype == np.uint8:
                yield torch.from_numpy(part)
            else:
                yield torch.from_numpy(part.astype(np.float32).clip(0, 1)).permute(0, 3, 1, 2)
        self._check_unchanged()


class EncodedImages(Images):
    """Images of a folder or an archive, decoded as in `bvae.data.decoders.pillow.decode_image`, and not resized.

    Args:
        numbers: which of the source's items; by default all.
    """

    def __init__(self, source: Source, grey: bool = False, numbers: np.ndarray | None = None) -> None:
        self.source = source
        self.grey = grey
        self.name = source.path
        self.numbers = np.arange(len(source.items)) if numbers is None else numbers
        self.n = len(self.numbers)
        self.notes = tuple(source.left_out())
        self._kept: list[Tensor] | None = None

    def first(self, count: int) -> "EncodedImages":
        some = EncodedImages(self.source, self.grey, self.numbers[:count])
        some.notes = self.notes
        return some

    def _read_all(self) -> str:
        """Digest of the files' bytes; sizes, depths and channels are checked by what the files say of themselves."""
        h = hashlib.sha256(f"encoded 2 {PIL.__version__}".encode())
        first = ""
        wanted = self._wanted(self.numbers)
        with quiet():
            for _, items in self.source.chunks(wanted):
                for item in items:
                    try:
                        data = item.read()
                        height, width, mode = inspect_image(data)
                    except Rejected as error:
                        self._refuse(item.name, str(error))
                    h.update(hashlib.sha256(data).digest())
                    if mode in ("1", "L", "LA") and not self.grey:
                        raise UserError(f"{self.name}: {item.name}: {GREY}")
                    first = first or item.name
                    self.size = self.size or (height, width)
                    if (height, width) != self.size:
                        sizes = " and ".join(f"{w}x{h}" for h, w in (self.size, (height, width)))
                        raise UserError(
                            f"{self.name}: images of different sizes ({sizes}: {first}, {item.name}); bring them to "
                            "one size first, since how that is done moves the FID"
                        )
        self.source.check_unchanged()
        return f"sha256:{h.hexdigest()}"

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        if self._kept is not None:
            return
        self.digest()
        assert self.size is not None
        keep = self.n * math.prod(self.size) * 3 // ranks <= KEPT_BYTES
        kept = []
        for batch in self._decoded(rank, ranks):
            if keep:
                kept.append(batch)
        self._kept = kept if keep else None

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else self._decoded(rank, ranks)

    def _decoded(self, rank: int, ranks: int) -> Iterator[Tensor]:
        self.digest()
        assert self.size is not None
        recipe = Recipe(size=self.size, channels=3, crop="exact")
        image = math.prod(recipe.shape)
        rows = max(1, min(READ, READ_BYTES // image))
        mine = self.numbers[np.arange(self.n) // rows % ranks == rank]
        chunks: list[list[Item]] = []

        def pieces() -> Iterator[list[Item]]:
            for _, items in self.source.chunks(self._wanted(mine), max(1, min(CHUNK_IMAGES, CHUNK_BYTES // image))):
                chunks.append(items)
                yield items

        batch: list[np.ndarray] = []
        held = 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 1 if len(mine) < FEW_IMAGES else max(1, cores // ranks)
        with open_decoder("pillow", recipe, workers) as decoder:
            for decoded in decoder.run(pieces()):
                items = chunks.pop(0)
                for position, reason in decoded.rejected:
                    self._refuse(items[position].name, reason)
                pixels = decoded.pixels
                while held + len(pixels) >= rows:
                    batch.append(pixels[: rows - held])
                    pixels = pixels[rows - held :]
                    yield torch.from_numpy(np.concatenate(batch))
                    batch, held = [], 0
                if len(pixels):
                    batch.append(pixels)
                    held += len(pixels)
        if batch:
            yield torch.from_numpy(np.concatenate(batch))
        self.source.check_unchanged()

    def _wanted(self, numbers: np.ndarray) -> Callable[[int], bool]:
        wanted = np.zeros(len(self.source.items), bool)
        wanted[numbers] = True
        return lambda number: bool(wanted[number])

    def _refuse(self, name: str, reason: str) -> None:
        self.source.check_unchanged()  # a change would be the reason
        raise UserError(f"{self.name}: {name} {reason}") from None


class ChangedImages(Images):
    """A set after a round trip through JPEG, or stretched (`bvae.metrics.protocols.stretch`)."""

    def __init__(self, images: Images, through_jpeg: bool, stretched: bool) -> None:
        self.images, self.through_jpeg, self.stretched = images, through_jpeg, stretched
        self.name, self.n, self.notes = images.name, images.n, images.notes

    def first(self, count: int) -> "ChangedImages":
        return ChangedImages(self.images.first(count), self.through_jpeg, self.stretched)

    def check(self, rank: int = 0, ranks: int = 1) -> None:
        self.images.check(rank, ranks)

    def _read_all(self) -> str:
        return self.images.digest()  # the protocol's name records the changes

    def batches(self, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        for batch in self.images.batches(rank, ranks):
            if self.through_jpeg:
                batch = torch.from_numpy(jpeg.roundtrip(quantise(batch).numpy()))
            if self.stretched:  # in float64: not all of a batch at a time
                few = max(1, CHUNK_BYTES // max(1, batch[0].numel()))
                batch = torch.cat([stretch(part) for part in batch.split(few)])
            yield batch


def open_images(text: str, grey: bool = False) -> Images | Statistics:
    """Opens the images or statistics at a path, which may end in `:train`, `:val` or `:test` where there are splits.

    The default is the test images for data sets and arrays with a split, and all images for folders and archives.
    Raises UserError, in one line that names the path, where the path holds neither images nor statistics.
    """
    if not text.strip():
        raise UserError("the path is empty: images or statistics are expected")
    path, split = _split_of(text)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise refusal(repr(text), "not a usable path", error) from error
    suffix = path.suffix.lower()
    if known := named.find(path):
        if (split or "test") not in known.splits:
            raise refusal(path, f"has no {split}, only {' and '.join(known.splits)}")
        return ArrayImages(known.splits[split or "test"](), f"{path}:{split or 'test'}", grey)
    if is_folder and (path / "test.npy").is_file():
        if split not in (None, "test"):
            raise refusal(path, f"a folder of NumPy files without {split}.npy")
        return ArrayImages(arrays.read_npy(path / "test.npy"), str(path / "test.npy"), grey)
    if is_file and suffix == ".npy":
        return ArrayImages(arrays.read_npy(_whole(path, split)), str(path), grey)
    if is_file and suffix == ".npz":
        return _open_npz(path, split, grey)
    if is_file and "idx3-ubyte" in path.name:
        return ArrayImages(idx.read(_whole(path, split)), str(path), grey)
    if is_file and suffix == ".mat":
        return ArrayImages(svhn.read(_whole(path, split)), str(path), grey)
    if is_file and not path.name.lower().endswith(ARCHIVES) and (holds := kinds.container(path.name)):
        raise refusal(path, f"not opened: it is {holds}")
    return _open_encoded(path, split, grey)


def _split_of(text: str) -> tuple[Path, str | None]:
    head, _, tail = text.rpartition(":")
    return (Path(head), tail) if head and tail in NAMES and not Path(text).exists() else (Path(text), None)


def _whole(path: Path, split: str | None) -> Path:
    if split is not None:
        raise refusal(path, f"has no splits to take {split} of")
    return path


def _open_encoded(path: Path, split: str | None, grey: bool) -> EncodedImages:
    source = open_source(path)
    plan = named_splits(source)
    if split is None:
        images = EncodedImages(source, grey)
        if plan is not None and plan.description["by"] == "folders":
            images.notes += (f"all its images are taken, whatever folder they are in; {path}:test takes those of test",)
        return images
    if plan is None:
        _whole(path, split)
    assert plan is not None
    numbers = np.flatnonzero(plan.part == SPLITS.index(split)) if split in SPLITS else np.array([], int)
    if not len(numbers):
        raise refusal(path, f"has no images for {split} (split by {plan.how})")
    images = EncodedImages(source, grey, numbers)
    images.name = f"{path}:{split}"
    return images


def _open_npz(path: Path, split: str | None, grey: bool) -> Images | Statistics:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
    except Exception as error:  # NumPy and zipfile report damage in many ways
        raise refusal(path, "not a readable NumPy archive", error) from error
    if holds_statistics(names):
        statistics, _ = load_statistics(_whole(path, split))
        others = [name for name in names if name not in ("mu", "sigma", "meta", "features")]
        if not others:
            return statistics
        return replace(statistics, notes=(f"its mu and sigma are taken, not {', '.join(others)}",))
    found = arrays.open_npz(path)
    wanted = split or next((name for name in ("test", "train", arrays.ALL) if name in found.splits), "val")
    if wanted not in found.splits:
        raise refusal(path, f"has no {wanted}, only {', '.join(found.keys.values())}")
    images = ArrayImages(found.splits[wanted](), f"{path}[{found.keys[wanted]}]", grey)
    others = [key for name, key in found.keys.items() if name != wanted] + found.unused
    images.notes = (f"not measured of it: {', '.join(others)}",) if others else ()
    return images
