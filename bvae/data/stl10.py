"""STL-10's binary files: https://cs.stanford.edu/~acoates/stl10. Images of 96x96, colour, each channel by columns."""

import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from bvae.data.refusal import refusal
from bvae.errors import UserError

SIDE = 96
FOLDER = "stl10_binary"
FILES = {"train": "train_X.bin", "test": "test_X.bin", "unlabeled": "unlabeled_X.bin"}
_BYTES = 3 * SIDE * SIDE


def find_folder(folder: Path) -> dict[str, Path] | None:
    """{split: its file} in a folder or the official one below it; None where there is no train_X.bin or test_X.bin.

    Raises:
        UserError: if one of the two is missing.
    """
    for candidate in (folder, folder / FOLDER):
        found = {split: candidate / name for split, name in FILES.items() if (candidate / name).is_file()}
        if "train" in found or "test" in found:
            for split in ("train", "test"):
                if split not in found:
                    raise refusal(candidate, f"this STL-10 is incomplete: {FILES[split]} is missing")
            return found
    return None


def read(file: Path) -> np.ndarray:
    """The images of one file, uint8 [N, 96, 96, 3]. Raises UserError where it holds no whole number of them."""
    try:
        return _parse(str(file), np.fromfile(file, np.uint8))
    except OSError as error:
        raise refusal(file, "cannot be read", error) from error


def is_tar(path: Path) -> bool:
    """True if a file with the name of a tar archive has one of the STL-10 files among its first members."""
    if not path.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        return False
    try:
        with tarfile.open(path, "r:*") as archive:
            return any(
                PurePosixPath(member.name).name in FILES.values() for _, member in zip(range(8), archive, strict=False)
            )
    except Exception:  # damaged in one of many ways, which is reported when it is read
        return False


def tar_reader(path: Path) -> Callable[[str], np.ndarray]:
    """A function that reads a split's images from `stl10_binary.tar.gz`, in memory; nothing is extracted."""

    def read_split(split: str) -> np.ndarray:
        found = None
        try:
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    if PurePosixPath(member.name).name == FILES[split] and member.isfile():
                        file = archive.extractfile(member)
                        assert file is not None  # only regular files come here
                        found = _parse(f"{path}[{FILES[split]}]", np.frombuffer(file.read(), np.uint8))
                while archive.fileobj.read(2**20):  # to the end, where gzip has its checksum
                    pass
        except UserError:
            raise
        except Exception as error:  # tarfile, gzip and zlib report damage in many ways
            raise refusal(path, "not a readable tar archive", error) from error
        if found is None:
            raise refusal(path, f"this STL-10 is incomplete: {FILES[split]} is missing")
        return found

    return read_split


def _parse(where: str, data: np.ndarray) -> np.ndarray:
    if not len(data) or len(data) % _BYTES:
        raise refusal(where, f"has {len(data)} bytes, no whole number of STL-10's images of {_BYTES}: truncated?")
    return np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1))
