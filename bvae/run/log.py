"""The log of a training run: ``metrics.jsonl``, TensorBoard, a tracker, and the progress display.

Only the process that owns the run folder gives a `RunLog` a folder; every other rank of a distributed run gives it
None and may then make all the same calls, which do nothing.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console

from bvae.errors import Interrupted, UserError
from bvae.files import encode_json, write_atomically, writing
from bvae.run.display import Display
from bvae.run.tensorboard import EventFile
from bvae.run.trackers import Status, Tracker

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def _line(record: Mapping[str, Any]) -> bytes:
    """`record` as a line of ``metrics.jsonl``."""
    return encode_json(record).encode() + b"\n"


def _decoded(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value


def _parse_metrics(path: Path) -> list[dict[str, Any]]:
    """The raw records of a metrics file, less a torn last line; UserError for any other line that is not a record."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    *lines, rest = data.split(b"\n")
    if rest:
        lines.append(rest)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not all(type(record.get(key)) is int for key in ("stage", "epoch")):
                raise ValueError("not a record")
        except ValueError:
            # A process killed while it wrote leaves a last line without its end; nothing else does.
            if rest and number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a record of an epoch (a JSON object with stage and epoch)"
            ) from None
        records.append(record)
    return records


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of ``folder/metrics.jsonl`` in order, one dict an epoch.

    A last line torn by a killed process is left out. null, which stands for a number that was not finite, is read as
    NaN, in lists too. Raises UserError for a file that cannot be read and for any other line that is no record, which
    it names by number.
    """
    return [{key: _decoded(value) for key, value in record.items()} for record in _parse_metrics(folder / METRICS)]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in nested mappings, under its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


class RunLog:
    """The log of one run. A context manager: leaving it restores the terminal and closes the files.

    folder: the run's folder, made if missing, which then holds ``metrics.jsonl`` (one JSON object a line, one line an
    epoch, keys in the order in which they were given, null for a number that is not finite) and
    ``tensorboard/stage1``, ``tensorboard/stage2`` (an event file each and per resume, on an axis of that stage's
    epochs). None for a process that is to write and show nothing: all ranks but the first.

    resume_after: None for a new run, whose folder must hold no ``metrics.jsonl`` yet. To resume, the number of
    finished epochs of every stage that the checkpoint knows, such as ``{1: 700, 2: 13}``; a missing stage counts as
    0. Later lines and a torn last one are removed from ``metrics.jsonl``, all or none, and the TensorBoard curves go
    on from there.

    tracker: gets what TensorBoard gets. Where it fails, one line says so and the run goes on without it.

    quiet: show nothing. Otherwise the display is a live bar where `console` (standard output, if None) is a
    terminal, and a line an epoch elsewhere.

    Every method raises UserError, naming path and reason, where the folder or the disk fails; a line of
    ``metrics.jsonl`` is then written whole or not at all.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        resume_after: Mapping[int, int] | None = None,
        tracker: Tracker | None = None,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._folder = folder
        self._tracker = tracker
        self._resume_after = resume_after
        self._display = None if quiet or folder is None else Display(console or Console())
        self._events: dict[int, EventFile] = {}
        self._stage = 0
        if folder is None:
            return
        path = folder / METRICS
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if resume_after is not None and path.exists():
            self._cut_back(path, resume_after)
        with writing(path):
            # Unbuffered: a line is in the file or the call fails, with nothing left over for close() to write.
            self._metrics = io.FileIO(path, "x" if resume_after is None else "a")
        for stage in (1, 2):
            # Now rather than at the stage's first epoch, so that the curves agree with metrics.jsonl from the start.
            if (folder / TENSORBOARD / f"stage{stage}").exists():
                self._events_of(stage)

    @staticmethod
    def _cut_back(path: Path, resume_after: Mapping[int, int]) -> None:
        kept = [record for record in _parse_metrics(path) if record["epoch"] <= resume_after.get(record["stage"], 0)]
        data = b"".join(_line(record) for record in kept)
        if data != path.read_bytes():
            write_atomically(path, data)

    def _events_of(self, stage: int) -> EventFile:
        assert self._folder is not None
        if stage not in self._events:
            # TensorBoard drops everything of a folder from the purged step on, whatever its tag: hence a folder a
            # stage, so that a resume in the second does not cut the first short.
            purge_step = None
            if self._resume_after is not None:
                kept = self._resume_after.get(stage, 0)
                purge_step = kept + 1 if kept else 0
            self._events[stage] = EventFile(self._folder / TENSORBOARD / f"stage{stage}", purge_step)
        return self._events[stage]

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write down one finished epoch: a line of ``metrics.jsonl``, forced to the disk, TensorBoard and the display.

        record: "stage" (1 or 2) and "epoch" (from 1, in the stage), both int, and any numbers, strings and lists of
        numbers, arrays too. In TensorBoard numbers are curves and lists are histograms, named ``stage1/<key>`` with
        the epoch as the step. "step" (finished steps of the stage) sets the display's count.
        """
        stage, epoch = record["stage"], record["epoch"]
        if self._folder is None:
            return
        self._append(_line(record))
        events = self._events_of(stage)
        mirrored = {
            f"stage{stage}/{key}": value.tolist() if hasattr(value, "tolist") else value
            for key, value in record.items()
            if key not in ("stage", "epoch")
        }
        events.values(mirrored, epoch)
        events.flush()
        self._track(lambda tracker: tracker.values(mirrored, epoch))
        if self._display is not None:
            self._display.epoch(record)

    def _append(self, line: bytes) -> None:
        assert self._folder is not None
        end = os.fstat(self._metrics.fileno()).st_size
        with writing(self._folder / METRICS):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._metrics.write(rest) :]
                os.fsync(self._metrics.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._metrics.fileno(), end)
                raise

    def image(self, tag: str, array: np.ndarray, step: int) -> None:
        """Add a picture to TensorBoard as ``stage<the one last started>/<tag>``.

        array: uint8 [H,W,C], C 1 or 3. step: the epoch. Raises ValueError for another array, or before `start`.
        """
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
            raise ValueError(f"image() takes uint8 [H,W,1] or [H,W,3], not {array.dtype} {list(array.shape)}")
        if not self._stage:
            raise ValueError("image() before start()")
        if self._folder is not None:
            events = self._events_of(self._stage)
            events.image(f"stage{self._stage}/{tag}", array, step)
            events.flush()
            self._track(lambda tracker: tracker.image(f"stage{self._stage}/{tag}", array, step))

    def final(self, results: Mapping[str, Any], step: int) -> None:
        """The run's final figures, ``final/<key>/<key>`` in TensorBoard: every number in `results`, however deep.

        step: the epoch. Raises ValueError before `start`.
        """
        if not self._stage:
            raise ValueError("final() before start()")
        if self._folder is not None:
            values = dict(_leaves("final", results))
            events = self._events_of(self._stage)
            events.values(values, step)
            events.flush()
            self._track(lambda tracker: tracker.final(values))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        tracker = self._tracker
        try:
            call(tracker)
        except Exception as error:  # raised by a foreign library or network: training matters more
            self._tracker = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.note(f"warning: {tracker.name} has failed, and the run goes on without it: {reason}")

    def start(
        self,
        stage: int,
        epochs: int,
        steps_per_epoch: int,
        first_step: int = 0,
        *,
        images_per_step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        """Begin the display of a stage, and end that of the one before.

        epochs: of the whole stage; first_step: steps already done, not 0 after a resume; images_per_step: of one call
        to `step` with n = 1, for the live images/s in the terminal (0: not shown until the first epoch is over);
        total_steps: of the stage, where it ends before its last epoch does.
        """
        self._stage = stage
        if self._display is not None:
            total = total_steps or epochs * steps_per_epoch
            self._display.start(stage, epochs, steps_per_epoch, first_step, images_per_step, total)

    def note(self, line: str) -> None:
        """Say something once, above the progress display."""
        if self._display is not None:
            self._display.note(line)

    def step(self, n: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Count `n` more steps. Cheap: it touches no device and draws at most four times a second.

        values: numbers on the host to show from now on, under the keys of `epoch`'s record, where the caller has
        them between two epochs.
        """
        if self._display is not None:
            self._display.step(n, values)

    def close(self, status: Status = "finished") -> None:
        """Restore the terminal and close the files. May be called again. status: how the tracker's run has ended."""
        if self._display is not None:
            self._display.stop()
        self._track(lambda tracker: tracker.close(status))
        self._tracker = None
        if self._folder is not None:
            self._metrics.close()
        while self._events:
            self._events.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        self.close("finished" if kind is None else "stopped" if stopped else "failed")
