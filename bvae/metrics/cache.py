"""Statistics kept from one run to the next, under all that decides about them."""

import contextlib
import hashlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bvae.errors import UserError
from bvae.files import encode_json
from bvae.metrics.statistics import Origin, Statistics, load_statistics, save_statistics

VERSION = 1  # version of the feature computation: a change that alters features needs a new version
VARIABLE = "BVAE_CACHE"


def default_folder() -> Path | None:
    """$BVAE_CACHE, or `bvae` in the user's folder for caches; None for a user without a home, as in some containers."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bvae")
    except RuntimeError:
        return None


class Cache:
    """A folder of statistics. A file that is damaged or was made by something else is as good as none.

    Args:
        folder: made when there is something to keep; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, images: str, origin: Origin, n: int, features: bool, device: torch.device) -> Statistics | None:
        """Statistics of n images with this digest, on `device`; None where there are none, or none with `features`."""
        path, key = self._place(images, origin, n)
        try:
            if path is None or not path.is_file():
                return None
            found, meta = load_statistics(path)
        except (UserError, OSError):
            return None
        if any(meta.get(name) != value for name, value in key.items()) or (features and found.features is None):
            return None
        return found.to(device)

    def put(self, images: str, statistics: Statistics) -> None:
        """Keeps them, where the folder can be written; says so where it cannot."""
        assert statistics.n is not None
        path, key = self._place(images, statistics.origin, statistics.n)
        if path is None:
            return
        mine = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")  # others may be writing the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_statistics(mine, statistics, key)
            os.replace(mine, path)
        except (UserError, OSError) as error:
            with contextlib.suppress(OSError):
                mine.unlink()
            print(f"note: the statistics were not cached: {error}", file=sys.stderr)

    def _place(self, images: str, origin: Origin, n: int) -> tuple[Path | None, dict[str, Any]]:
        key = {"version": VERSION, "images": images, "n": n, **asdict(origin)}
        name = hashlib.sha256(encode_json(key).encode()).hexdigest()[:32]
        return (self.folder / "fid" / f"{name}.npz" if self.folder else None), key
