"""CIFAR-10 and CIFAR-100 in their official forms: the python and the binary version, unpacked or as the .tar.gz.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. The python version is a set of pickles. They are read by an
unpickler that knows four names, all bound to code in this file: nothing that a pickle asks for is executed.
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bvae.data.refusal import refusal
from bvae.errors import UserError

IMAGES_PER_BATCH = 10_000

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class Kind:
    """One of the two sets.

    name, title: for a data set and for messages.
    train, test: names of the batches, which in the binary version end in .bin.
    sizes: of each batch, in units of IMAGES_PER_BATCH.
    labels: the largest value of each label byte in the binary version.
    folders: in which they come.
    mark: a file that tells the python version from any folder with such names; None where the names tell.
    """

    name: str
    title: str
    train: tuple[str, ...]
    test: str
    sizes: dict[str, int]
    labels: tuple[int, ...]
    folders: tuple[str, ...]
    mark: str | None = None

    @property
    def batches(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    def count(self, batch: str) -> int:
        return self.sizes[batch] * IMAGES_PER_BATCH


_TRAIN_10 = tuple(f"data_batch_{i}" for i in range(1, 6))
BATCHES = (*_TRAIN_10, "test_batch")
CIFAR10 = Kind(
    "cifar10",
    "CIFAR-10",
    _TRAIN_10,
    "test_batch",
    dict.fromkeys(BATCHES, 1),
    (9,),
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
)
CIFAR100 = Kind(
    "cifar100",
    "CIFAR-100",
    ("train",),
    "test",
    {"train": 5, "test": 1},
    (19, 99),
    ("cifar-100-python", "cifar-100-binary"),
    mark="meta",
)
KINDS = (CIFAR10, CIFAR100)


def find_folder(folder: Path) -> tuple[Kind, Path] | None:
    """(the set, the folder that holds its batches): this one, a sub-folder with an official name; or None."""
    for kind in KINDS:
        for candidate in (folder, *(folder / name for name in kind.folders)):
            python = any((candidate / name).is_file() for name in kind.batches)
            if kind.mark and not (candidate / kind.mark).is_file() and candidate.name not in kind.folders:
                python = False
            binary = any((candidate / f"{name}.bin").is_file() for name in kind.batches)
            if kind is CIFAR100 and not (candidate / "fine_label_names.txt").is_file():
                binary &= candidate.name in kind.folders
            if python or binary:
                return kind, candidate
    return None


def read_folder(kind: Kind, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train and test images of an unpacked set, uint8 [50000, 32, 32, 3] and [10000, 32, 32, 3].

    Raises:
        UserError: naming the batch that is missing, damaged or not of this set.
    """
    binary = any((folder / f"{name}.bin").is_file() for name in kind.batches)
    batches = {}
    for name in kind.batches:
        file = folder / (f"{name}.bin" if binary else name)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise refusal(folder, f"this {kind.title} is incomplete: {file.name} is missing") from error
        except OSError as error:
            raise refusal(file, "cannot be read", error) from error
        batches[name] = _parse(kind, str(file), name, data, binary)
    return _join(kind, batches)


def tar_kind(path: Path) -> Kind | None:
    """The set of which a batch is among the first members of a file that is a tar archive by its name, or None."""
    if not path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return None
    try:
        with tarfile.open(path, "r:*") as archive:
            for _, member in zip(range(12), archive, strict=False):  # they have at most eight, and a folder
                *_, folder, name = ("", *PurePosixPath(member.name).parts)
                if name.removesuffix(".bin") in BATCHES:
                    return CIFAR10
                if name.removesuffix(".bin") in CIFAR100.batches and folder in CIFAR100.folders and member.isfile():
                    return CIFAR100
    except Exception:  # damaged in one of many ways, which is reported when it is read
        return None
    return None


def read_tar(kind: Kind, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same from `cifar-10-python.tar.gz`, `cifar-100-binary.tar.gz` and their like, read in memory.

    Nothing is extracted: of the archive's members only regular files with a batch's name are looked at.
    """
    batches: dict[str, np.ndarray] = {}
    # tarfile, gzip and zlib report damage in many ways; whatever they raise, the archive cannot be read.
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                base = PurePosixPath(member.name).name
                name, binary = base.removesuffix(".bin"), base.endswith(".bin")
                if name not in kind.batches or not member.isfile():
                    continue
                where = f"{path}[{base}]"
                if name in batches:
                    raise refusal(where, "is there twice")
                if member.size > 2 * kind.count(name) * _PIXELS + 2**20:
                    raise refusal(where, f"has {member.size} bytes, too many for a batch of {kind.title}")
                file = archive.extractfile(member)
                assert file is not None  # only regular files come here
                batches[name] = _parse(kind, where, name, file.read(), binary)
            while archive.fileobj.read(2**20):  # to the end, where gzip has its checksum
                pass
    except UserError:
        raise
    except Exception as error:
        raise refusal(path, "not a readable tar archive", error) from error
    missing = [name for name in kind.batches if name not in batches]
    if missing:
        raise refusal(path, f"not a {kind.title} archive: {', '.join(missing)} missing")
    return _join(kind, batches)


def _join(kind: Kind, batches: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([batches[name] for name in kind.train]), batches[kind.test]


def _parse(kind: Kind, where: str, name: str, data: bytes, binary: bool) -> np.ndarray:
    """One batch file's bytes -> uint8 [count, 32, 32, 3]."""
    parse = _parse_binary if binary else _parse_pickle
    planes = parse(kind, where, kind.count(name), data)
    return np.ascontiguousarray(planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


def _parse_binary(kind: Kind, where: str, count: int, data: bytes) -> np.ndarray:
    labels = len(kind.labels)
    expected = count * (labels + _PIXELS)
    if len(data) != expected:
        raise refusal(where, f"has {len(data)} bytes; a binary batch of {kind.title} has {expected}: truncated?")
    records = np.frombuffer(data, np.uint8).reshape(count, labels + _PIXELS)
    for column, most in enumerate(kind.labels):
        if records[:, column].max() > most:
            raise refusal(where, f"not {kind.title}: a label is above {most}")
    return records[:, labels:]


def _parse_pickle(kind: Kind, where: str, count: int, data: bytes) -> np.ndarray:
    # A damaged pickle can raise nearly anything, from UnpicklingError to UnicodeDecodeError and MemoryError.
    try:
        batch = _BatchUnpickler(data).load()
    except Exception as error:
        raise refusal(where, f"not a readable {kind.title} batch", error) from error
    pixels = (batch.get(b"data", batch.get("data"))) if isinstance(batch, dict) else None
    if not isinstance(pixels, _PickledArray):
        raise refusal(where, f"not a {kind.title} batch: it has no array `data`")
    expected = (count, _PIXELS)
    if pixels.dtype != "u1" or pixels.shape != expected or len(pixels.raw) != count * _PIXELS:
        raise refusal(
            where,
            f"not a {kind.title} batch: `data` is {pixels.dtype} {pixels.shape} in {len(pixels.raw)} bytes,"
            f" uint8 {expected} expected",
        )
    return np.frombuffer(pixels.raw, np.uint8).reshape(expected, order="F" if pixels.fortran else "C")


class _PickledDtype:
    """Stands in for numpy.dtype: keeps the code ("u1"), ignores byte order and alignment."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _PickledArray:
    """Stands in for numpy.ndarray: what the pickle says of an array, unchecked, and none of NumPy's code run on it."""

    shape: object = None
    dtype: object = None
    fortran: object = False
    raw: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, self.fortran, raw = state
        self.dtype = dtype.code if isinstance(dtype, _PickledDtype) else None
        self.raw = raw if isinstance(raw, bytes) else b""


class _BatchUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and arrays; refuses every other name before anything is called."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Callable[..., object] | str:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only ever an argument of _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")


def _reconstruct(*_: object) -> _PickledArray:
    return _PickledArray()


def _dtype(code: object, *_: object) -> _PickledDtype:
    return _PickledDtype(code.decode("latin-1") if isinstance(code, bytes) else str(code))


def _encode(text: str, encoding: object) -> bytes:
    """Python 3 writes bytes into an old protocol as latin-1 text."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r}")
    return text.encode("latin-1")
