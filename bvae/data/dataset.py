"""`load`: from a path, or none, to a checked data set."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bvae.data import arrays, images, jpeg, kinds, named, shapes
from bvae.data.archive import ARCHIVES, check_stamp, content_of, count, open_source, stamp
from bvae.data.decoders import open_decoder
from bvae.data.recipe import Crop, Recipe, Size, size_text
from bvae.data.refusal import refusal
from bvae.data.splits import TEST, TRAIN, VAL, Fractions, hold_out, make_plan
from bvae.data.store import array_digest, joint_digest
from bvae.errors import UserError

FEW_IMAGES = 500  # decoded before worker processes would have started


@dataclass(frozen=True)
class Factors:
    """The true factors behind generated images.

    names: of the columns, see `bvae.data.shapes.RANGES` for their units.
    train, test: float32 [N, 8] and [M, 8], a row for each image; val likewise, where images are held out.
    """

    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray
    val: np.ndarray | None = None


@dataclass(frozen=True)
class Dataset:
    """Images, in memory or mapped.

    name: "shapes", "cifar10", or the name of the file or folder they came from.
    train, test: uint8 [N, H, W, C] and [M, H, W, C], C-contiguous, C 1 or 3. In memory and writable, unless they were
        to stay mapped: then read-only, and `train` of a .npy is an `arrays.Rows`, which stands in for one.
    digest: "sha256:..." over the shapes and pixels of train and test; equal digests mean equal data.
    factors: of shapes only.
    val: uint8 [V, H, W, C], the images that `hold_out` has moved here from `train`.
    notes: lines for people: how images were split, and what of the source is left out.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    digest: str
    factors: Factors | None = None
    val: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def from_arrays(train: Any, test: Any = None, *, name: str = "arrays", seed: int = 0) -> "Dataset":
        """A data set of images that are in memory, or mapped, already.

        Args:
            train: uint8 [N, H, W, C] with 1 or 3 channels, or [N, H, W]: a NumPy array, or a tensor, which is copied
                from its device. A `numpy.memmap` stays on the disk.
            test: the same, of the same size and channels; by default a tenth of `train`, taken out at random by `seed`.
            name: for messages and reports.

        Raises:
            UserError: for another dtype or shape; nothing is converted. For a single image without `test`.
        """
        train = arrays.as_array(train, f"{name} (train)")
        size, channels = arrays.image_size(train, f"{name} (train)")
        train = arrays.check_images(train, f"{name} (train)", size, channels, mapped=True)
        if test is None:
            train, test = _without_tenth(name, train, seed)
        else:
            test = arrays.as_array(test, f"{name} (test)")
            if (theirs := arrays.image_size(test, f"{name} (test)")) != (size, channels):
                (h, w), (test_h, test_w) = size, theirs[0]
                raise UserError(f"{name}: train is of {h}x{w}x{channels}, test of {test_h}x{test_w}x{theirs[1]}")
            test = arrays.check_images(test, f"{name} (test)", size, channels, mapped=True)
        return Dataset(name, train, test, joint_digest(array_digest(train), array_digest(test)))

    def hold_out(self, n: int, seed: int = 0) -> "Dataset":
        """This data set with `n` images of `train`, chosen at random by `seed`, moved to `val`.

        Both keep the order of `train`. `test` and the digest stay: they say which data this is, not how it is used.

        Raises:
            UserError: if images are held out already, or `n` would leave none to train on.
        """
        if self.val is not None:
            raise UserError(f"{self.name}: {len(self.val)} images are held out for validation already")
        if not 0 < n < len(self.train):
            raise UserError(
                f"--val must be from 1 to {len(self.train) - 1}, as {self.name} has {len(self.train)} images to train "
                f"on, got {n}"
            )
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))  # hold_out's own draw is another
        chosen = np.zeros(len(self.train), bool)
        chosen[rng.permutation(len(self.train))[:n]] = True
        train, val = arrays.divide(self.train, chosen)
        factors = self.factors
        if factors is not None:
            factors = replace(factors, train=factors.train[~chosen], val=factors.train[chosen])
        return replace(self, train=train, val=val, factors=factors)


class _Images(NamedTuple):
    """The images as read, unchecked. test: None where it is held out later. digest: of both, where it is known."""

    name: str
    train: np.ndarray
    test: np.ndarray | None
    digest: str | None = None
    notes: tuple[str, ...] = ()


def load(
    path: Path | str | None = None,
    *,
    side: Size,
    channels: int,
    crop: Crop = "square",
    partition: Path | str | None = None,
    fractions: Fractions | None = None,
    jpeg_roundtrip: bool = False,
    seed: int = 0,
    num_train: int = 20_000,
    num_test: int = 2_000,
    mapped: bool = False,
    quiet: bool = True,
) -> Dataset:
    """Load a data set; what it is follows from what lies at the path (docs/data.md).

    Args:
        path: None or "shapes" for the generated set; CIFAR-10, CIFAR-100 or STL-10 as a folder or .tar.gz; SVHN's or
            MNIST's files; .npy; .npz; a prepared store; a folder, zip, tar or shards of images.
        side: height and width of the images in pixels, or one number for both. Only encoded images are resized to it.
        channels: 3 (RGB) or 1 (grey). Only encoded images are converted to it.
        crop: what of an encoded image is kept, see `bvae.data.recipe.Recipe`.
        partition, fractions: which encoded image is for what, see `bvae.data.splits.make_plan`.
        jpeg_roundtrip: pass every image, train and test, through JPEG with Pillow's defaults.
        seed: of the generated set, and of the choice of test images where a source has no test split.
        num_train, num_test: sizes of the generated set; other sources are used whole.
        mapped: leave the arrays of a store or .npy on the disk. A store's digest is then taken from its meta.json,
            unread. With `jpeg_roundtrip` they are in memory all the same.
        quiet: neither notes (`Dataset.notes`) nor, while images are decoded, progress on stderr.

    Raises:
        UserError: in one line that names the path, for anything that is missing, damaged or not as described.
    """
    if path == "":
        raise UserError("--data is empty: a path or `shapes` is expected")
    if channels not in (1, 3):
        raise UserError(f"--channels must be 1 or 3, got {channels}")
    if seed < 0:
        raise UserError(f"--data-seed must not be negative, got {seed}")

    source = "shapes" if path is None else path
    try:
        recipe = Recipe(size=side, channels=channels, crop=crop)
    except UserError as error:
        raise UserError(f"--side, --crop: {error}") from None
    factors = digest = None
    notes: tuple[str, ...] = ()
    try:
        if str(source) == "shapes":
            name = "shapes"
            train, test, factors = _generate(recipe, seed, num_train, num_test)
        else:
            how = {
                key: value for key, value in (("partition", partition), ("fractions", fractions)) if value is not None
            }
            name, train, test, digest, notes = _load(Path(source), recipe, how, seed, mapped, quiet)
        if jpeg_roundtrip:
            train, test, digest = jpeg.roundtrip(np.asarray(train)), jpeg.roundtrip(np.asarray(test)), None
        if digest is None:
            digest = joint_digest(array_digest(train), array_digest(test))
    except MemoryError as error:
        raise refusal(source, "does not fit in memory", error) from error
    except OSError as error:  # mostly permissions, met while looking at what is there
        raise refusal(source, "cannot be read", error) from error
    return Dataset(name, train, test, digest, factors, notes=notes)


def _generate(recipe: Recipe, seed: int, num_train: int, num_test: int) -> tuple[np.ndarray, np.ndarray, Factors]:
    if recipe.channels != 3:
        raise UserError("shapes: the images are coloured; --channels 3 expected")
    side = recipe.size
    if not isinstance(side, int):
        raise UserError(f"shapes: the images are square, not {size_text(*side)}: change --side")
    if num_train < 1 or num_test < 1:
        raise UserError(f"shapes: at least one image each is expected, got {num_train} train and {num_test} test")
    train, train_factors = shapes.make_shapes(num_train, side, seed, stream=0)
    test, test_factors = shapes.make_shapes(num_test, side, seed, stream=1)
    return train, test, Factors(shapes.NAMES, train_factors, test_factors)


def _load(
    path: Path, recipe: Recipe, how: dict[str, Any], seed: int, mapped: bool, quiet: bool
) -> tuple[str, np.ndarray, np.ndarray, str | None, tuple[str, ...]]:
    """(name, train, test, digest where it is known, notes) of what lies at a path, checked."""
    name, train, test, digest, notes = _read(path, recipe, how, seed, quiet)
    size, channels = recipe.size, recipe.channels
    train = arrays.check_images(train, f"{path} (train)" if test is not None else str(path), size, channels, mapped)
    if test is None:
        train, test = _without_tenth(path, train, seed)
    else:
        test = arrays.check_images(test, f"{path} (test)", size, channels, mapped)
    if digest is not None and not mapped and joint_digest(array_digest(train), array_digest(test)) != digest:
        raise refusal(path, "has changed since it was prepared: its digest is not the one in meta.json")
    return name, train, test, digest, notes


def _without_tenth(where: Path | str, images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) of images without a split."""
    chosen = np.zeros(len(images), bool)
    chosen[hold_out(where, np.arange(len(images)), seed)] = True
    return arrays.divide(images, chosen)


def _read(path: Path, recipe: Recipe, how: dict[str, Any], seed: int, quiet: bool) -> _Images:
    try:
        is_file = path.is_file()
        path.is_dir()
        name = path.resolve().name
    except (OSError, ValueError) as error:  # a path that no file can have
        raise refusal(repr(str(path)), "not a usable path", error) from error
    suffix = path.suffix.lower()
    known = named.find(path, recipe.size)
    if known is None and not (is_file and suffix in (".npy", ".npz")):
        if is_file and not name.lower().endswith(ARCHIVES):
            if holds := kinds.container(name):
                raise refusal(path, f"not a data set that is read: {holds}")
            expected = "a folder, .npy, .npz, or archive (.zip, .tar, .tar.gz, ...) is expected"
            raise refusal(path, f"not a data set: {expected}{_hint(path)}")
        return _decode(path, name, recipe, how, seed, quiet)
    if how:
        raise refusal(
            path, f"--partition and --split are for images: {known.title if known else suffix} has no use for it"
        )
    with unchanged(path):
        if known is not None:
            others = [split for split in known.splits if split not in ("train", "test")]
            notes = tuple(f"{path}: the images of {split} are not used" for split in others)
            _say(notes, quiet)
            train, test = known.splits["train"](), known.splits["test"]()
            return _Images(known.name or name, train, test, known.digest, notes)
        if suffix == ".npy":
            return _Images(name, arrays.read_npy(path), None)
        return _read_npz(path, name, quiet)


def _say(notes: Iterable[str], quiet: bool) -> None:
    for note in notes if not quiet else ():
        print(note, file=sys.stderr)


def _hint(path: Path) -> str:
    if "idx3-ubyte" in path.name:
        return "; of idx files give the folder"
    if path.suffix.lower() == ".mat":
        return "; of SVHN give the folder with train_32x32.mat and test_32x32.mat"
    is_here = content_of(path)
    return f"; this is {is_here}" if is_here else ""


def _read_npz(path: Path, name: str, quiet: bool) -> _Images:
    found = arrays.open_npz(path)
    if "train" not in found.splits and arrays.ALL not in found.splits:
        raise refusal(path, f"holds {' and '.join(found.keys.values())}, and no images to train on")
    read = {split: found.splits[split]() for split in found.splits if split != "val"}
    unused = ([f"{found.keys['val']}"] if "val" in found.keys else []) + found.unused
    notes = (f"{path}: {', '.join(unused)} not used",) if unused else ()
    _say(notes, quiet)
    return _Images(name, read["train"] if "train" in read else read[arrays.ALL], read.get("test"), notes=notes)


@contextlib.contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raises UserError at the end where a file of arrays, or one in their folder, has changed in the block."""
    files = [path] if path.is_file() else [file for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file()][:99]
    taken = {file: stamp(file.stat()) for file in files}
    yield
    for file, before in taken.items():
        check_stamp(str(file), before, file.stat() if file.exists() else None)


def _decode(path: Path, name: str, recipe: Recipe, how: dict[str, Any], seed: int, quiet: bool) -> _Images:
    """Encoded images, none of which may be unusable. They are decoded into place, by Pillow whatever else is installed:
    a run must be able to go on with the same pixels."""
    source = open_source(path)
    plan = make_plan(source, seed=seed, **how)
    notes = [f"{path}: {line}" for line in (f"split by {plan.how}", *source.left_out(), *plan.notes)]
    if validation := int((plan.part == VAL).sum()):
        notes.append(f"{path}: {count(validation, 'image')} for validation not used")
    decoded = {split: np.empty((int((plan.part == split).sum()), *recipe.shape), np.uint8) for split in (TRAIN, TEST)}

    def place(split: int, rows: np.ndarray, pixels: np.ndarray) -> None:
        decoded[split][rows] = pixels

    _say(notes, quiet)
    with open_decoder("pillow", recipe, 1 if len(source.items) < FEW_IMAGES else None) as decoder:
        images.decode(source, plan, decoder, recipe, place, splits=decoded, strict=True, quiet=quiet)
    return _Images(name, decoded[TRAIN], decoded[TEST], notes=tuple(notes))
