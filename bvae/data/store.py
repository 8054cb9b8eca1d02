"""The prepared store: a folder with one uint8 .npy a split, `meta.json`, which says how they came about, `rejects.csv`.

A store appears whole or not at all. It is written into `.NAME.partial` beside its place, which a lock marks as in use,
and renamed once everything is on the disk. What a killed run has left there, the next one clears away.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from bvae.data.refusal import refusal
from bvae.data.splits import SPLITS
from bvae.errors import UserError
from bvae.files import encode_json

FORMAT = "bvae store"
VERSION = 1
META = "meta.json"
REJECTS = "rejects.csv"
ARRAYS = tuple(f"{split}.npy" for split in SPLITS)
FILES = (META, *ARRAYS, REJECTS)  # as they are removed: the one that is locked last

_HEADER = 128  # bytes: NumPy's own size for arrays of up to 10^20 images of this kind
_BLOCK = 2**24  # bytes read or moved at a time


@dataclass(frozen=True)
class Store:
    """A prepared store, open for reading.

    path: its folder.
    meta: the contents of meta.json (docs/prepare.md).
    train, val, test: uint8 [N, S, S, C], read-only and mapped: a slice reads what it covers. val may have no images.
    """

    path: Path
    meta: dict[str, Any]
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """`bvae.data.Dataset.digest` of train and test, as meta.json has it."""
        return self.meta["digest"]

    @staticmethod
    def open(path: Path | str, verify: bool = False) -> "Store":
        """Opens a store, and checks that its arrays are of the form that meta.json says.

        Args:
            path: the store's folder.
            verify: read every array and compare its digest too.

        Raises:
            UserError: if it is no store, incomplete, or not what meta.json says.
        """
        path = Path(path)
        meta = read_meta(path)
        arrays = {}
        for split in SPLITS:
            file = path / f"{split}.npy"
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
                told = meta["arrays"][split]
                expected = tuple(told["shape"]), told["digest"]
            except (OSError, ValueError, EOFError, SyntaxError) as error:
                raise refusal(file, "not a readable NumPy file", error) from error
            except (KeyError, TypeError) as error:
                raise refusal(path / META, f"says nothing of {split}.npy") from error
            if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != expected[0]:
                raise refusal(file, f"is not the array of shape {list(expected[0])} that {META} says")
            if verify and array_digest(array) != expected[1]:
                raise refusal(file, f"has changed since it was prepared: its digest is not the one in {META}")
            arrays[split] = array
        if joint_digest(*(meta["arrays"][split]["digest"] for split in ("train", "test"))) != meta.get("digest"):
            raise refusal(path / META, "has changed since it was written: its digests contradict each other")
        return Store(path, meta, **arrays)


def has_meta(path: Path) -> bool:
    """Whether a folder is a store, rather than one with arrays and perhaps a meta.json of the user's own.

    Raises:
        UserError: if its meta.json cannot be read.
    """
    if not (path / META).exists():
        return False
    meta = _read_json(path / META)
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def read_meta(path: Path) -> dict[str, Any]:
    """The contents of a store's meta.json. Raises UserError if there is none, or one of something else."""
    file = path / META
    if not path.is_dir():
        raise refusal(path, "no such folder")
    if not file.exists():
        raise refusal(path, f"not a prepared store: it has no {META}")
    meta = _read_json(file)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise refusal(file, f"is not of a prepared store (`format` is not {FORMAT!r})")
    if meta.get("version") != VERSION:
        raise refusal(file, f"is of version {meta.get('version')!r}; this bvae reads version {VERSION}")
    return meta


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise refusal(file, "cannot be read", error) from error
    except (ValueError, RecursionError) as error:
        raise refusal(file, "not readable JSON", error) from error


def array_digest(array: np.ndarray) -> str:
    """SHA-256 over the shape, as Python writes it, and the bytes in C order, read a block at a time."""
    rows = max(1, _BLOCK // max(1, array[:1].nbytes))
    blocks = (np.ascontiguousarray(array[start : start + rows]).data for start in range(0, len(array), rows))
    return _digest(array.shape, blocks)


def _digest(shape: Iterable[int], blocks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256(repr(tuple(map(int, shape))).encode())
    for block in blocks:
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def joint_digest(train: str, test: str) -> str:
    """The digest of a data set from those of its arrays, so that a store's is known without reading it."""
    return f"sha256:{hashlib.sha256(f'{train} {test}'.encode()).hexdigest()}"


class StoreWriter:
    """Writes a store. A context: left before `finish`, or by an exception, it leaves nothing.

    The images come in any order, and some may never come. here: of each split, bool [images], those that have come.

    Args:
        path: the store's folder, which must not exist, unless it is empty.
        overwrite: replace a store that is there, at the end.

    Raises:
        UserError: at once, if the folder is taken, cannot be written, or is being written by another process.
    """

    def __init__(self, path: Path | str, overwrite: bool = False) -> None:
        self.path = Path(path)
        # Where it really lies: a link to a folder is not replaced, what it leads to is.
        real = Path(os.path.realpath(self.path))
        if not real.name or os.path.ismount(real):
            raise refusal(self.path, "cannot be a store: name a new folder")
        self._real, self._overwrite = real, overwrite
        self._folder = real.with_name(f".{real.name}.partial")
        self._replaced = real.with_name(f".{real.name}.replaced")
        self._files: dict[str, int] = {}
        self._lock: io.TextIOWrapper | None = None
        with self._writing():
            self._claim()
        try:
            with self._writing():
                self._recover()
                self._check_target()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._files.clear()
        if self._lock is not None:
            self._clear(self._folder)
            self._lock.close()
            self._lock = None

    def allocate(self, counts: dict[str, int], image: tuple[int, int, int]) -> None:
        """Makes the arrays' files.

        Args:
            counts: of each split, the images that may come.
            image: their shape, (height, width, channels).

        Raises:
            UserError: if the disk has no room for them, or does not let them be made.
        """
        self._image = image
        self._row = math.prod(image)
        with self._writing():
            needed, free = sum(counts.values()) * self._row, shutil.disk_usage(self._folder).free
            if needed > free:
                raise refusal(self.path, f"needs {needed / 2**20:.1f} MiB, and the disk has {free / 2**20:.1f} left")
            self.here = {split: np.zeros(counts[split], bool) for split in SPLITS}
            for split in SPLITS:
                self._files[split] = os.open(self._folder / f"{split}.npy", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def place(self, split: str, rows: np.ndarray, pixels: np.ndarray) -> None:
        """Writes images where they belong among those that may come.

        Args:
            split: "train", "val" or "test".
            rows: int [n].
            pixels: uint8 [n, height, width, channels].

        Raises:
            UserError: if they cannot be written.
        """
        data = np.ascontiguousarray(pixels)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with self._writing():
            for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                if first < last:
                    _write(self._files[split], data[first:last].data.cast("B"), _HEADER + int(rows[first]) * self._row)
        self.here[split][rows] = True

    def finish(self, meta: dict[str, Any], rejects: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """Closes the gaps that missing images left, writes the rest, and puts the store into its place.

        Args:
            meta: of meta.json; the arrays' shapes and digests are added.
            rejects: (name, reason) of the lines of rejects.csv.

        Returns:
            what meta.json holds.

        Raises:
            UserError: if something cannot be written.
        """
        with self._writing():
            arrays, digests = {}, {}
            for split in SPLITS:
                count = self._close_gaps(split)
                shape = (count, *self._image)
                _write(self._files[split], _header(shape), 0)
                os.ftruncate(self._files[split], _HEADER + count * self._row)
                os.fsync(self._files[split])
                # Read, not mapped: what is mapped counts as this process's memory.
                end = _HEADER + count * self._row
                blocks = (os.pread(self._files[split], min(_BLOCK, end - at), at) for at in range(_HEADER, end, _BLOCK))
                digests[split] = _digest(shape, blocks)
                os.close(self._files.pop(split))
                arrays[split] = {"shape": list(shape), "digest": digests[split]}
            digest = joint_digest(digests["train"], digests["test"])
            meta = {"format": FORMAT, "version": VERSION, "digest": digest, "arrays": arrays, **meta}
            self._write_rejects(rejects)
            with open(self._folder / META, "w", encoding="ascii") as file:
                file.write(encode_json(meta, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(self._folder)
            self._move_in()
        return meta

    # --- the folder

    def _recover(self) -> None:
        """A run killed while it replaced a store has left the old one under another name: back with it, or away."""
        if not self._replaced.is_dir():
            return
        if not self._real.exists() and set(os.listdir(self._replaced)) >= {META, *ARRAYS}:
            os.rename(self._replaced, self._real)
        else:
            self._clear(self._replaced)

    def _check_target(self) -> None:
        if not os.path.lexists(self._real):
            return
        if not self._real.is_dir():
            raise refusal(self.path, "exists and is not a folder")
        found = set(os.listdir(self._real))
        if not found:
            return
        # By what meta.json says, not by names: others too keep a train.npy beside a meta.json.
        if not found >= {META, *ARRAYS} or not has_meta(self._real):
            raise refusal(self.path, "exists and is not a prepared store: choose another --out")
        if not self._overwrite:
            raise refusal(self.path, "exists already: choose another --out, or replace it with --overwrite")
        if strange := found.difference(FILES):
            raise refusal(self.path, f"is not replaced: {min(strange)} in it is not of the store")

    def _claim(self) -> None:
        """Makes the partial folder, or takes over that of a dead run.

        Its rejects.csv is locked as long as this process lives; by a POSIX lock, which no child inherits.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = open(self._folder / REJECTS, "a+", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
        try:
            self._take(lock)
            strange = sorted(set(os.listdir(self._folder)).difference(FILES))
            if strange:
                raise refusal(self._folder, f"is in the way: {strange[0]} in it is not of an unfinished store")
        except BaseException:
            lock.close()
            raise
        self._lock = lock
        for name in (META, *ARRAYS):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder / name)

    def _take(self, lock: io.TextIOWrapper) -> None:
        busy = refusal(self.path, "another process is preparing this store")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy from error
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                raise
        try:
            still = os.stat(self._folder / REJECTS).st_ino == os.fstat(lock.fileno()).st_ino
        except FileNotFoundError:
            still = False
        if not still:  # it has just been finished, or given up
            raise busy

    def _move_in(self) -> None:
        assert self._lock is not None
        self._check_target()  # again: much time has passed
        for name in FILES:
            if not (self._folder / name).exists():
                raise refusal(self._folder, f"has lost its {name}: something else removes files there")
        if self._real.is_dir() and any(self._real.iterdir()):
            os.rename(self._real, self._replaced)
        try:
            os.rename(self._folder, self._real)
        except OSError:
            self._recover()
            raise
        # From here on a partial folder is another process's.
        lock, self._lock = self._lock, None
        with lock:
            _sync_folder(self._real.parent)
            if self._replaced.is_dir():
                self._clear(self._replaced)

    def _clear(self, folder: Path) -> None:
        """Removes a store's files, and the folder if nothing else is in it.

        The locked one goes last: without it another process takes the folder for its own.
        """
        for name in FILES:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    # --- the files

    def _close_gaps(self, split: str) -> int:
        """Moves the rows down over those that never came, in the file; the number of rows that are left."""
        file, here = self._files[split], self.here[split]
        end = 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], here, [False]])))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if first != end:
                step = max(1, _BLOCK // self._row)
                for start in range(first, last, step):
                    size = (min(start + step, last) - start) * self._row
                    data = os.pread(file, size, _HEADER + start * self._row)
                    _write(file, memoryview(data), _HEADER + (end + start - first) * self._row)
            end += last - first
        return end

    def _write_rejects(self, rejects: Iterable[tuple[str, str]]) -> None:
        assert self._lock is not None
        self._lock.truncate(0)
        writer = csv.writer(self._lock, lineterminator="\n")
        writer.writerow(("name", "reason"))
        writer.writerows(rejects)
        self._lock.flush()
        os.fsync(self._lock.fileno())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


def _header(shape: tuple[int, ...]) -> memoryview:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    data = header.getvalue()
    assert len(data) == _HEADER, len(data)
    return memoryview(data)


def _write(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
