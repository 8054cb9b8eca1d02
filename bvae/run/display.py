"""The progress of a training as a person sees it: a live bar in a terminal or notebook, a line an epoch elsewhere."""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from bvae.files import writing

SHOWN = ("loss", "objective", "mse", "kl", "gamma2")  # figures of an epoch, in this order
REFRESH_SECONDS = 0.25


def numbers_of(values: Mapping[str, Any]) -> str:
    """The shown figures of `values` on one line."""
    return "  ".join(f"{key} {values[key]:.5g}" for key in SHOWN if values.get(key) is not None)


class _Bar(Progress):
    """A progress bar with the latest numbers on a line of their own: together they do not fit into 80 columns."""

    numbers = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers)


class _NotebookLine:
    """One line of a notebook cell's output, replaced again and again; needs no widgets."""

    def __init__(self) -> None:
        self._display = importlib.import_module("IPython.display")
        self._handle: Any = None

    def show(self, text: str) -> None:
        content = self._display.Pretty(text)
        if self._handle is None:
            self._handle = self._display.display(content, display_id=True)
        else:
            self._handle.update(content)


class Display:
    """The progress of one stage after another. It draws at most four times a second and never touches the device."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: _Bar | None = None
        self._line: _NotebookLine | None = None
        self._stage: int | None = None
        self._done = 0

    def start(
        self, stage: int, epochs: int, steps_per_epoch: int, first_step: int, images_per_step: int, total_steps: int
    ) -> None:
        """Begins a stage; see RunLog.start."""
        self.stop()
        self._stage, self._epochs, self._steps_per_epoch = stage, epochs, steps_per_epoch
        self._images_per_step = images_per_step
        self._first = self._done = first_step
        self._total = total_steps
        self._started = self._refreshed = time.monotonic()
        self._values: dict[str, Any] = {}
        if self._console.is_jupyter:
            self._line = _NotebookLine()
            self._refresh()
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(
                TextColumn("stage {task.fields[stage]}  epoch {task.fields[epoch]}/{task.fields[epochs]}  step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
                auto_refresh=False,  # by hand in step(): a thread would compete with the one that feeds the device
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=self._total, completed=first_step, stage=stage, epoch=self._current_epoch(), epochs=epochs
            )
            with writing(Path("standard output")):
                self._bar.start()
            self._refresh()
        else:
            begun = f", from step {first_step}" if first_step else ""
            self.note(f"stage {stage}: {epochs} epochs of {steps_per_epoch} steps{begun}")

    def note(self, line: str) -> None:
        """Says something once, above the progress."""
        with writing(Path("standard output")):
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def step(self, n: int, values: Mapping[str, float] | None) -> None:
        self._done += n
        if self._bar is None and self._line is None:
            return
        if values:
            self._values |= values
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self._refresh()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Shows a finished epoch's figures."""
        if self._stage != record["stage"]:
            return
        self._done = record.get("step", self._done)
        if self._bar is not None or self._line is not None:
            self._values |= record
            self._refresh()
            return
        parts = [f"stage {record['stage']}  epoch {record['epoch']}/{self._epochs}  step {self._done}"]
        parts.append(numbers_of(record))
        if "images_per_s" in record:
            parts.append(f"{record['images_per_s']:,.0f} images/s")
        if self._rate():
            parts.append(f"{self._left()} left")
        self.note("  ".join(part for part in parts if part))

    def stop(self) -> None:
        """Ends the stage's progress and restores the terminal. May be called again."""
        if self._line is not None:
            self._refresh()
            self._line = None
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with writing(Path("standard output")):
                bar.update(self._task, completed=self._done)
                bar.stop()

    def _current_epoch(self) -> int:
        return min(self._done // max(self._steps_per_epoch, 1) + 1, self._epochs)

    def _rate(self) -> float:
        """Steps a second since the stage began in this process."""
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def _left(self) -> timedelta:
        return timedelta(seconds=round(max(self._total - self._done, 0) / self._rate()))

    def _refresh(self) -> None:
        self._refreshed = time.monotonic()
        numbers = numbers_of(self._values)
        images_per_s = self._rate() * self._images_per_step or self._values.get("images_per_s", 0)
        if images_per_s:
            numbers += f"  {images_per_s:,.0f} images/s"
        with writing(Path("standard output")):
            if self._line is not None:
                where = f"stage {self._stage}  epoch {self._current_epoch()}/{self._epochs}  step {self._done}"
                left = f"  {self._left()} left" if self._rate() else ""
                self._line.show(f"{where}/{self._total}  {numbers.strip()}{left}")
            elif self._bar is not None:
                self._bar.numbers = numbers.strip()
                self._bar.update(self._task, completed=self._done, epoch=self._current_epoch())
                self._bar.refresh()


@contextmanager
def following() -> Iterator[Callable[[str, int, int], None]]:
    """A progress display on stderr: the yielded function takes (name, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def follow(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield follow
