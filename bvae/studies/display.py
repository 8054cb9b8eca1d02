"""One display for all trainings of a study: a live table in a terminal, a line an event elsewhere."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_SECONDS = 0.5


@dataclass
class Line:
    """A training that runs now."""

    cell: str
    what: str
    place: str
    record: Mapping[str, Any]
    """its last finished epoch"""
    epochs: tuple[int, int]
    seconds: float


class Display:
    """Shows how far a study is. A context manager; quiet ones show nothing."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._began = time.monotonic()
        self._drawn = 0.0
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def due(self) -> bool:
        return self._live is not None and time.monotonic() - self._drawn >= REFRESH_SECONDS

    def show(self, lines: Sequence[Line], done: int, failed: int, total: int) -> None:
        """Draws the table anew."""
        if self._live is not None:
            self._drawn = time.monotonic()
            self._live.update(self._drawing(lines, done, failed, total), refresh=True)

    def _drawing(self, lines: Sequence[Line], done: int, failed: int, total: int) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for name in ("cell", "step", "epoch", "mse", "KL", "images/s", "time", "on"):
            table.add_column(name, justify="left" if name in ("cell", "step", "on") else "right", no_wrap=True)
        for line in lines:
            table.add_row(*row_of(line))
        spent = timedelta(seconds=round(time.monotonic() - self._began))
        failures = f", {failed} failed" if failed else ""
        return Group(table, Text(f"{done} of {total} cells done{failures}, {spent}"))


def row_of(line: Line) -> list[str]:
    """A training's line of the table."""
    r = line.record
    stage = r.get("stage")
    epoch = f"{stage}: {r['epoch']}/{line.epochs[stage - 1]}" if stage in (1, 2) else ""

    def number(key: str, form: str) -> str:
        value = r.get(key)
        return format(value, form) if isinstance(value, int | float) else ""

    figures = (number("mse", ".5f"), number("kl", ".2f"), number("images_per_s", ",.0f"))
    training = line.what == "training"
    shown = (epoch, *figures) if training else ("", "", "", "")
    return [line.cell, line.what, *shown, str(timedelta(seconds=round(line.seconds))), line.place]
