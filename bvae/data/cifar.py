"""CIFAR-10 in its official forms: the python and the binary version, unpacked or as the .tar.gz they come in.

Format: https://www.cs.toronto.edu/~kriz/cifar.html. The python version is a set of pickles. They are read by an
unpickler that knows four names, all bound to code in this file: nothing that a pickle asks for is executed.
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bvae.data.refusal import refusal
from bvae.errors import UserError

TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
BATCHES = (*TRAIN_BATCHES, "test_batch")
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
IMAGES_PER_BATCH = 10_000

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_PICKLE = 2**26  # bytes; an official one has 31 million


def find_folder(folder: Path) -> Path | None:
    """The folder that holds CIFAR-10's batches: this one, a sub-folder with an official name, or None."""
    for candidate in (folder, *(folder / name for name in FOLDERS)):
        if any((candidate / f"{name}{suffix}").is_file() for name in BATCHES for suffix in ("", ".bin")):
            return candidate
    return None


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Train and test images of an unpacked CIFAR-10, uint8 [50000, 32, 32, 3] and [10000, 32, 32, 3].

    Raises:
        UserError: naming the batch that is missing, damaged or not CIFAR-10.
    """
    binary = any((folder / f"{name}.bin").is_file() for name in BATCHES)
    batches = {}
    for name in BATCHES:
        file = folder / (f"{name}.bin" if binary else name)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise refusal(folder, f"this CIFAR-10 is incomplete: {file.name} is missing") from error
        except OSError as error:
            raise refusal(file, "cannot be read", error) from error
        batches[name] = _parse(str(file), data, binary)
    return _join(batches)


def is_tar(path: Path) -> bool:
    """Whether a batch of CIFAR-10 is among the first members of a file that is a tar archive by its name."""
    if not path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return False
    try:
        with tarfile.open(path, "r:*") as archive:
            for _, member in zip(range(12), archive, strict=False):  # it has eight, and a folder
                if PurePosixPath(member.name).name.removesuffix(".bin") in BATCHES:
                    return True
    except Exception:  # damaged in one of many ways, which is reported when it is read
        return False
    return False


def read_tar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same from `cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`, read in memory.

    Nothing is extracted: of the archive's members only regular files with a batch's name are looked at.
    """
    batches: dict[str, np.ndarray] = {}
    # tarfile, gzip and zlib report damage in many ways; whatever they raise, the archive cannot be read.
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                base = PurePosixPath(member.name).name
                name, binary = base.removesuffix(".bin"), base.endswith(".bin")
                if name not in BATCHES or not member.isfile():
                    continue
                where = f"{path}[{base}]"
                if name in batches:
                    raise refusal(where, "is there twice")
                if member.size > _MAX_PICKLE:
                    raise refusal(where, f"has {member.size} bytes, too many for a batch of CIFAR-10")
                file = archive.extractfile(member)
                assert file is not None  # isfile() was true
                batches[name] = _parse(where, file.read(), binary)
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                pass  # to the end, where gzip checks its checksum: damage may leave all sizes as they were
    except UserError:
        raise
    except Exception as error:
        raise refusal(path, "not a readable tar archive", error) from error
    missing = [name for name in BATCHES if name not in batches]
    if missing:
        raise refusal(path, f"not a CIFAR-10 archive: {', '.join(missing)} missing")
    return _join(batches)


def _join(batches: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([batches[name] for name in TRAIN_BATCHES]), batches["test_batch"]


def _parse(where: str, data: bytes, binary: bool) -> np.ndarray:
    """One batch file's bytes -> uint8 [10000, 32, 32, 3]."""
    planes = _parse_binary(where, data) if binary else _parse_pickle(where, data)
    return np.ascontiguousarray(planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


def _parse_binary(where: str, data: bytes) -> np.ndarray:
    expected = IMAGES_PER_BATCH * (1 + _PIXELS)
    if len(data) != expected:
        raise refusal(where, f"has {len(data)} bytes; a binary batch of CIFAR-10 has {expected}: truncated?")
    records = np.frombuffer(data, np.uint8).reshape(IMAGES_PER_BATCH, 1 + _PIXELS)
    if records[:, 0].max() > 9:
        raise refusal(where, "not CIFAR-10: a label is above 9")
    return records[:, 1:]


def _parse_pickle(where: str, data: bytes) -> np.ndarray:
    # A damaged pickle can raise nearly anything, from UnpicklingError to UnicodeDecodeError and MemoryError.
    try:
        batch = _BatchUnpickler(data).load()
    except Exception as error:
        raise refusal(where, "not a readable CIFAR-10 batch", error) from error
    pixels = (batch.get(b"data", batch.get("data"))) if isinstance(batch, dict) else None
    if not isinstance(pixels, _PickledArray):
        raise refusal(where, "not a CIFAR-10 batch: it has no array `data`")
    expected = (IMAGES_PER_BATCH, _PIXELS)
    if pixels.dtype != "u1" or pixels.shape != expected or len(pixels.raw) != IMAGES_PER_BATCH * _PIXELS:
        raise refusal(
            where,
            f"not a CIFAR-10 batch: `data` is {pixels.dtype} {pixels.shape} in {len(pixels.raw)} bytes,"
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
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")


def _reconstruct(*_: object) -> _PickledArray:
    return _PickledArray()


def _dtype(code: object, *_: object) -> _PickledDtype:
    return _PickledDtype(code.decode("latin-1") if isinstance(code, bytes) else str(code))


def _encode(text: str, encoding: object) -> bytes:
    """Python 3 writes bytes into an old protocol as latin-1 text."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r}")
    return text.encode("latin-1")
