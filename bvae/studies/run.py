"""Runs what is missing of a study, some trainings side by side, and keeps study.json up with what is there."""

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from bvae.errors import Interrupted, UserError
from bvae.studies.cells import KEPT, Scope, Step, last_record, read_json
from bvae.studies.display import Display, Line
from bvae.studies.jobs import Child, Place
from bvae.studies.kept import keep
from bvae.studies.plan import Cell
from bvae.studies.store import Store

POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""time for a training to save its state when the study is asked to end"""
LOGS = "logs"


class Running:
    """A cell on its place, and the step that it is in."""

    def __init__(self, cell: Cell, place: Place) -> None:
        self.cell = cell
        self.place = place
        self.step: Step | None = None
        self.child: Child | None = None
        self.since = time.monotonic()
        self.failed: dict[str, str] = {}
        """step -> why"""


class Runner:
    """The loop over cells.

    Args:
        scope: the plan and its folder.
        store: what is known already.
        places: one for each training that may run at a time.
        inherited: descriptors of the folder's lock.
    """

    def __init__(
        self, scope: Scope, store: Store, places: Sequence[Place], display: Display, inherited: Sequence[int] = ()
    ) -> None:
        self.scope = scope
        self.store = store
        self.display = display
        self.inherited = tuple(inherited)
        self._free = list(places)
        self._running: list[Running] = []
        self._stop: int | None = None
        self.cells = scope.plan.cells_of_part()
        self._pending: list[Cell] = []
        self._done = self._failed = 0

    def run(self) -> int:
        """Runs everything that is missing; returns the number of cells that failed.

        Raises Interrupted where a signal asked for the end; what ran has then saved its state.
        """
        (self.scope.options.out / KEPT).mkdir(exist_ok=True)
        self._take_stock()
        with self._signals(), self.display:
            try:
                while (self._pending or self._running) and self._stop is None:
                    self._start()
                    self._look()
                    self._show()
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_children()
        if self._stop is not None:
            raise Interrupted(self._stop, "the study was stopped; the same command goes on with it")
        return self._failed

    def _take_stock(self) -> None:
        """Sorts the cells into those that are done, those that cannot be trained, and those to be run."""
        for cell in self.cells:
            problem = self.scope.row(cell).problem
            if self.store.done(cell):
                self._done += 1
            elif problem:
                self.store.fail(cell, problem)
                self._failed += 1
            else:
                self._pending.append(cell)
        self.store.save()

    # ---- starting ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Puts pending cells on free places."""
        for cell in list(self._pending):
            if not self._free:
                return
            found = self.scope.findings(cell, self.store.values)
            if found is None:
                if not self._awaited(cell):
                    self._pending.remove(cell)
                    self._finish(cell, {"needs": "the row whose figure it needs has failed"})
                continue
            self._pending.remove(cell)
            running = Running(cell, self._free.pop(0))
            self._running.append(running)
            self._clear(cell)
            self._advance(running)

    def _awaited(self, cell: Cell) -> bool:
        """True while a cell whose findings this one needs has not ended."""
        needed = {source.row for source in self.scope.row(cell).needs}
        others = [*self._pending, *(running.cell for running in self._running)]
        return any(other.row in needed and other.seed == cell.seed for other in others)

    def _clear(self, cell: Cell) -> None:
        """Removes what a training that was killed as it made its folder has left beside it."""
        folder = self.scope.folder(cell)
        for left in folder.parent.glob(f".{cell.name}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def _advance(self, running: Running) -> None:
        """Starts the next step of a cell, or ends the cell."""
        cell = running.cell
        found = self.scope.findings(cell, self.store.values) or {}
        try:
            step = self.scope.next_step(cell, found, running.failed)
            if step is not None and step == running.step:
                running.failed[step.what] = "it ended without what it should have left"
                step = None if step.training else self.scope.next_step(cell, found, running.failed)
        except UserError as error:
            running.failed["reading"] = str(error)
            step = None
        if step is None:
            self._running.remove(running)
            self._free.append(running.place)
            self._finish(cell, running.failed)
            return
        if running.step is None or running.step.what != step.what:
            self.display.say(f"{cell.name}: {step.what} on {running.place.name}")
        running.step, running.since = step, time.monotonic()
        log = self.scope.options.out / LOGS / f"{cell.name}.log"
        running.child = Child(step.command, log, running.place, self.inherited)

    # ---- ending -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Goes on with the cells whose step has ended."""
        for running in list(self._running):
            child, step = running.child, running.step
            assert child is not None and step is not None
            code = child.poll()
            if code is None:
                continue
            if code != 0 and self._stop is None:
                running.failed[step.what] = child.reason()
                self.display.say(f"{running.cell.name}: {step.what} failed: {child.reason()} ({child.log})")
            if self._stop is None:
                self._advance(running)

    def _finish(self, cell: Cell, failed: dict[str, str]) -> None:
        """Takes in a cell's figures; whatever was measured before a step failed counts."""
        folder = self.scope.folder(cell)
        try:
            figures = self.scope.figures(cell)
            self.store.add(cell, figures, read_json(folder / "config.json"))
            if figures:
                latents = self.scope.plan.study.picture == "latents"
                keep(self.scope.options.out, folder, cell, self.scope.row(cell).row.slug, latents)
        except UserError as error:
            failed = {**failed, "reading": str(error)}
        if not failed and not self.store.done(cell) and self.scope.wanted(self.scope.row(cell).row, cell.seed):
            failed = {"figures": "its folder does not hold every figure that is wanted"}
        if failed:
            self.store.fail(cell, "; ".join(f"{what}: {why}" for what, why in failed.items()))
            self._failed += 1
        else:
            self._done += 1
        self.store.save()
        outcome = "failed" if failed else "done"
        self.display.say(f"{cell.name}: {outcome}, {self._done + self._failed} of {len(self.cells)} cells")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While it is open SIGINT and SIGTERM end the loop, and a second one ends this process at once."""

        def stop(number: int, _: FrameType | None) -> None:
            self._stop = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_children(self) -> None:
        """Asks what still runs to save its state, and kills it where that takes too long."""
        children = [running.child for running in self._running if running.child is not None]
        for child in children:
            child.stop()
        end = time.monotonic() + GRACE_SECONDS
        for child in children:
            if not child.wait(max(0.0, end - time.monotonic())):
                child.stop(signal.SIGKILL)
                child.wait(5.0)

    def _show(self) -> None:
        if self.display.due():
            now = time.monotonic()
            lines = [
                Line(
                    running.cell.name,
                    running.step.what if running.step else "",
                    running.place.name,
                    last_record(self.scope.folder(running.cell)),
                    self._epochs(running.cell),
                    now - running.since,
                )
                for running in self._running
            ]
            self.display.show(lines, self._done, self._failed, len(self.cells))

    def _epochs(self, cell: Cell) -> tuple[int, int]:
        config = self.scope.row(cell).config
        return int(config.get("epochs") or 0), int(config.get("epochs2") or 0)
