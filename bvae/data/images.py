"""From a source of encoded images to arrays, wherever they are to go: what preparing a store and loading share."""

import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bvae.data.archive import CHUNK_IMAGES, FileItem, Source, Stamp, check_stamp
from bvae.data.decoders import Decoder
from bvae.data.recipe import Item, Recipe
from bvae.data.refusal import refusal
from bvae.data.splits import UNLISTED, Plan
from bvae.errors import UserError

Place = Callable[[int, np.ndarray, np.ndarray], None]  # (split, rows in it int [n], pixels [n, H, W, C])

_CHUNK_PIXELS = 2**23  # bytes of one chunk's result
_LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def decode(
    source: Source,
    plan: Plan,
    decoder: Decoder,
    recipe: Recipe,
    place: Place,
    *,
    splits: Collection[int],
    strict: bool = False,
    quiet: bool = False,
) -> list[tuple[str, str]]:
    """Decodes the images of some splits and hands each to its place.

    Args:
        source, plan: the images, and which split each is for.
        decoder: an open one, of this `recipe`.
        place: takes images; their rows count all images that are meant for the split, whether they come or not.
        splits: those that are wanted, of TRAIN, VAL and TEST.
        strict: end with the first image that cannot be used.
        quiet: no progress on stderr.

    Returns:
        (name, reason) of the images that could not be used, by name.

    Raises:
        UserError: as `strict` says, as the source and the decoder do, and if the source has changed meanwhile.
    """
    rows = np.zeros(len(plan.part), np.int64)
    for split in splits:
        rows[plan.part == split] = np.arange(np.count_nonzero(plan.part == split))
    wanted = np.isin(plan.part, list(splits))
    rejects = []

    def reject(number: int, reason: str) -> None:
        item = source.items[number]
        if strict:
            source.check_unchanged()  # a change would be the reason
            raise refusal(source.where(item), reason)
        rejects.append((item.name, reason))

    for number in np.flatnonzero(plan.part == UNLISTED).tolist():
        reject(number, f"is not in {plan.description['list']}")

    numbers_of_chunks: deque[np.ndarray] = deque()

    def chunks() -> Iterator[Sequence[Item]]:
        images = max(1, min(CHUNK_IMAGES, _CHUNK_PIXELS // math.prod(recipe.shape)))
        for numbers, items in source.chunks(lambda number: bool(wanted[number]), images):
            numbers_of_chunks.append(np.array(numbers))
            yield items

    with _Progress(int(wanted.sum()), quiet) as progress:
        for decoded in decoder.run(chunks()):
            numbers = numbers_of_chunks.popleft()
            kept = numbers[decoded.kept]
            for split in splits:
                mine = plan.part[kept] == split
                if mine.any():
                    place(split, rows[kept[mine]], decoded.pixels if mine.all() else decoded.pixels[mine])
            for position, reason in decoded.rejected:
                reject(int(numbers[position]), reason)
            progress.advance(len(numbers))
    source.check_unchanged()
    return sorted(rejects)


class SourceDigest(threading.Thread):
    """Computes a source's digest beside the decoding. A context: leaving it early ends the work.

    The digest of a single file is the file's SHA-256. Otherwise it is the SHA-256 of what `sha256sum` prints for the
    files in their order: of an archive's parts their names, of a folder's images their paths in it. Like that, it
    passes over an image that cannot be read.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._leave = threading.Event()
        self._digest = ""
        self._error: OSError | UserError | None = None

    def __enter__(self) -> "SourceDigest":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.join()

    def result(self) -> str:
        """Waits for it. Raises UserError if a file cannot be read, or has changed since it was listed."""
        self.join()
        if isinstance(self._error, UserError):
            raise self._error
        self._source.check_unchanged()
        if self._error is not None:
            raise refusal(self._error.filename or self._source.path, "cannot be read", self._error) from self._error
        return self._digest

    def run(self) -> None:
        try:
            # Images that cannot be read are rejects; an archive must be.
            self._digest = digest_of_files(self._files(), self._leave.is_set, skip=not self._source.files)
        except (OSError, UserError) as error:
            self._error = error

    def _files(self) -> Iterator[tuple[str, Path, Stamp | None]]:
        for file in self._source.files:
            yield file.name, file, None  # check_unchanged looks at archives
        for item in self._source.items if not self._source.files else []:
            if isinstance(item, FileItem):
                yield item.name, Path(item.root, item.name), item.stamp


def digest_of_files(
    files: Iterable[tuple[str, Path, Stamp | None]], leave: Callable[[], bool] = bool, skip: bool = False
) -> str:
    """The digest of (name, file, stamp when it was listed)s as `SourceDigest` defines it.

    Args:
        leave: says that nobody wants it any more.
        skip: pass over files that cannot be read.

    Raises:
        OSError: if one cannot be read.
        UserError: if one has another stamp now.
    """
    sums = []
    for name, file, taken in files:
        digest = hashlib.sha256()
        try:
            with open(file, "rb", buffering=0) as opened:
                while not leave() and (block := opened.read(2**20)):
                    digest.update(block)
                if taken is not None:
                    check_stamp(str(file), taken, os.fstat(opened.fileno()))
        except OSError as error:
            if taken is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
                check_stamp(str(file), taken, None)
            if skip:
                continue
            raise
        sums.append((digest.hexdigest(), os.fsencode(name)))
    if len(sums) == 1:
        return f"sha256:{sums[0][0]}"
    lines = b"".join(b"%b  %b\n" % (one.encode(), name) for one, name in sums)
    return f"sha256:{hashlib.sha256(lines).hexdigest()}"


class _Progress:
    """Images done, rate and time left: a bar on a terminal, elsewhere a line now and then, all on stderr."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._done = 0
        self._begin = self._last = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} images, {task.fields[rate]:.0f}/s,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, rate=0.0)

    def __enter__(self) -> "_Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        rate = self._done / max(now - self._begin, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif not self._quiet and now - self._last >= _LINE_SECONDS:
            self._last = now
            left = (self._total - self._done) / rate
            Console(stderr=True, soft_wrap=True).print(
                f"{self._done}/{self._total} images, {rate:.0f}/s, {left:.0f} s left", highlight=False
            )
