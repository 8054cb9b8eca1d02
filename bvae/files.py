"""Writing files so that they are whole or not there, and JSON that every reader takes."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bvae.errors import UserError


def given_text(text: str) -> str:
    """For argparse: a text that is not empty. An empty path is mostly a shell's variable that is not set, and would be
    the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def given_path(text: str) -> Path:
    """For argparse: a path that is not empty."""
    return Path(given_text(text))


def hold_standard_descriptors() -> None:
    """Opens /dev/null as each of stdin, stdout and stderr that is closed (`2>&-`), and gives Python's streams for them.

    Otherwise the next file that is opened takes the number, and gets what is meant for the stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False, errors="backslashreplace"))  # noqa: SIM115


def check_output(path: Path) -> None:
    """Raises UserError where `write_atomically` could not write a file, before there is anything to write."""
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {path}: not the name of a file")
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "ab"):
            pass
        temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a UserError that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def exists(path: Path) -> bool:
    """True if something exists at `path`. Raises UserError if that cannot be found out: no permission, no such name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be used: {getattr(error, 'strerror', None) or error}") from error
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that the file holds all of it or what it held before, whatever happens on the way.

    The bytes go to `<name>.tmp` beside the file, are forced to the disk and renamed over it. One process writes a
    given file at a time; a temporary left by a killed one is overwritten by the next. Raises UserError where the
    folder or the disk does not allow it.
    """
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {path}: not the name of a file")
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        # Without this a power cut may undo the rename, and with it the order in which files were replaced.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def encode_json(values: Any, indent: int | None = None) -> str:
    """`values` as JSON: arrays as lists, paths as strings, numbers that are not finite (JSON has no word) as null."""
    return json.dumps(_encodable(values), allow_nan=False, indent=indent)


def _encodable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch arrays and scalars
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value
