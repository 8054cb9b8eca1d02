"""`load`: from a path, or none, to a checked data set."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bvae.data import arrays, cifar, folder, shapes
from bvae.data.refusal import refusal
from bvae.errors import UserError

HELD_OUT = 10  # one image in so many becomes test where a source has no test split


@dataclass(frozen=True)
class Factors:
    """The true factors behind generated images.

    names: of the columns, see `bvae.data.shapes.RANGES` for their units.
    train, test: float32 [N, 8] and [M, 8], a row for each image.
    """

    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Images in memory.

    name: "shapes", "cifar10", or the name of the file or folder they came from.
    train, test: uint8 [N, H, W, C] and [M, H, W, C], C-contiguous, H = W, C 1 or 3.
    digest: "sha256:..." over the shapes and pixels of train and test; equal digests mean equal data.
    factors: of shapes only.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    digest: str
    factors: Factors | None


def load(
    path: Path | str | None = None,
    *,
    side: int,
    channels: int,
    jpeg_roundtrip: bool = False,
    seed: int = 0,
    num_train: int = 20_000,
    num_test: int = 2_000,
) -> Dataset:
    """Load a data set; what it is follows from what lies at the path (docs/data.md).

    Args:
        path: None or "shapes" for the generated set; CIFAR-10 as a folder or .tar.gz; .npy; .npz; a prepared store; a
            folder of images.
        side: height and width of the images, in pixels. Only a folder of images is resized to it.
        channels: 3 (RGB) or 1 (grey). Only a folder of images is converted to it.
        jpeg_roundtrip: pass every image, train and test, through JPEG with Pillow's defaults.
        seed: of the generated set, and of the choice of test images where a source has no test split.
        num_train, num_test: sizes of the generated set; other sources are used whole.

    Raises:
        UserError: in one line that names the path, for anything that is missing, damaged or not as described.
    """
    if path == "":
        raise UserError("--data is empty: a path or `shapes` is expected")
    if channels not in (1, 3):
        raise UserError(f"--channels must be 1 or 3, got {channels}")
    if side < 1:
        raise UserError(f"--side must be positive, got {side}")
    if seed < 0:
        raise UserError(f"--data-seed must not be negative, got {seed}")

    source = "shapes" if path is None else path
    factors = None
    try:
        if str(source) == "shapes":
            name = "shapes"
            train, test, factors = _generate(side, channels, seed, num_train, num_test)
        else:
            name, train, test = _read(Path(source), side, channels, seed)
        if jpeg_roundtrip:
            train, test = folder.jpeg_roundtrip(train), folder.jpeg_roundtrip(test)
    except MemoryError as error:
        raise refusal(source, "does not fit in memory", error) from error
    except OSError as error:  # mostly permissions, met while looking at what is there
        raise refusal(source, "cannot be read", error) from error
    return Dataset(name, train, test, _digest(train, test), factors)


def _generate(
    side: int, channels: int, seed: int, num_train: int, num_test: int
) -> tuple[np.ndarray, np.ndarray, Factors]:
    if channels != 3:
        raise UserError("shapes: the images are coloured; --channels 3 expected")
    if num_train < 1 or num_test < 1:
        raise UserError(f"shapes: at least one image each is expected, got {num_train} train and {num_test} test")
    train, train_factors = shapes.make_shapes(num_train, side, seed, stream=0)
    test, test_factors = shapes.make_shapes(num_test, side, seed, stream=1)
    return train, test, Factors(shapes.NAMES, train_factors, test_factors)


def _read(path: Path, side: int, channels: int, seed: int) -> tuple[str, np.ndarray, np.ndarray]:
    """(name, train, test) of what lies at a path, checked."""
    test: np.ndarray | None
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        name = path.resolve().name
    except (OSError, ValueError) as error:  # a path that no file can have
        raise refusal(repr(str(path)), "not a usable path", error) from error
    suffix = path.suffix.lower()
    if is_folder and (batches := cifar.find_folder(path)):
        name, (train, test) = "cifar10", cifar.read_folder(batches)
    elif is_folder and (path / "train.npy").exists():
        train, test = arrays.read_store(path)
    elif is_folder:
        train, test = folder.read_image_folder(path, side, channels)
    elif is_file and suffix == ".npy":
        train, test = arrays.read_npy(path), None
    elif is_file and suffix == ".npz":
        train, test = arrays.read_npz(path)
    elif is_file and path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        name, (train, test) = "cifar10", cifar.read_tar(path)
    elif is_file:
        raise refusal(path, "not a data set: a folder, .npy, .npz or CIFAR-10's .tar.gz is expected")
    else:
        raise refusal(path, "no such file or folder")

    train = arrays.check_images(train, f"{path} (train)" if test is not None else str(path), side, channels)
    if test is None:
        train, test = _hold_out(path, train, seed)
    else:
        test = arrays.check_images(test, f"{path} (test)", side, channels)
    return name, train, test


def _hold_out(path: Path, images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a tenth, at least one image, at random in the seed; both parts keep the order of the source."""
    if len(images) < 2:
        raise refusal(path, "holds a single image; at least two are needed, one to train on and one to test on")
    chosen = np.zeros(len(images), bool)
    chosen[np.random.default_rng(seed).permutation(len(images))[: max(1, len(images) // HELD_OUT)]] = True
    return images[~chosen], images[chosen]


def _digest(train: np.ndarray, test: np.ndarray) -> str:
    digest = hashlib.sha256()
    for images in (train, test):
        digest.update(repr(images.shape).encode())
        digest.update(images.data)
    return f"sha256:{digest.hexdigest()}"
