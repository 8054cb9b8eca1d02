"""How a stage's steps are run: one by one from Python, or several at a time as one CUDA graph.

A step is a few hundred small kernels, which a GPU finishes sooner than Python can launch them. The whole of it, from
drawing the batch to Adam and the sums, reads and writes tensors that stay where they are and never looks at them from
the host: so it is recorded once and replayed, and the numbers are those of the steps run one by one.

Rules of recording: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from bvae.batches.resident import Batches
from bvae.engine.step import Step
from bvae.errors import UserError
from bvae.models.fork import side_stream
from bvae.models.half import on_cuda

WARM_UP = 3  # steps before recording: cuDNN chooses its algorithms, libraries set themselves up
STEPS = 4  # steps a replay, where the data is resident
_failed: list[torch.cuda.CUDAGraph] = []  # recordings that failed: torch's allocator goes on asking them


class Runner(Protocol):
    """Runs the steps of a stage."""

    @property
    def why_eager(self) -> str | None:
        """Why steps are not replayed from a CUDA graph; None where they are."""
        ...

    def run(self, most: int) -> int:
        """Runs at least one and at most `most` (>= 1) steps, all in the epoch under way; returns how many.

        On CUDA it does not wait for them.
        """
        ...


class Eager:
    """Steps run one by one from Python."""

    def __init__(self, batches: Batches, step: Step, why: str) -> None:
        self.batches = batches
        self.step = step
        self.why_eager = why

    def run(self, most: int) -> int:
        self.batches.fetch()
        self.step(*self.batches.draw())
        return 1


class Graph:
    """Steps replayed from CUDA graphs of one and of several steps. To be made in training mode, after Batches.begin.

    Making it changes nothing but the gradients. Raises RuntimeError where the steps cannot be recorded.
    """

    why_eager = None

    def __init__(self, batches: Batches, step: Step) -> None:
        self.batches = batches
        self.copies = step.copies
        self.replays: dict[int, Callable[[], None]] = {}

        def steps(n: int) -> None:
            for _ in range(n):
                step(*batches.draw())

        # Off until measured: a block's shortcut on a stream of its own, its gradients too.
        side = torch.cuda.Stream() if os.environ.get("BVAE_SIDE_STREAM") == "1" else None
        with side_stream(side), _recording() as record, undone(batches, step) as undo:
            for _ in range(WARM_UP):
                steps(1)
                undo()
            # What a recorded step leaves in .grad must be of the graphs' own memory.
            step.zero_grad()
            for n in (1, STEPS) if batches.resident else (1,):
                self.replays[n] = record(lambda n=n: steps(n))  # type: ignore[misc]

    def run(self, most: int) -> int:
        n = max(n for n in self.replays if n <= most)
        self.batches.fetch()
        self.copies.refresh()
        self.replays[n]()
        return n


class Repeated:
    """A program of the same device operations every time, without gradients: on CUDA recorded after a few calls.

    Args:
        wanted: record it where that can be. Where recording fails, it goes on from Python.
    """

    def __init__(self, program: Callable[[], None], device: torch.device, wanted: bool) -> None:
        self.program = program
        self.recordable = wanted and on_cuda(device)
        self.calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.recordable and self.replay is None and self.calls > WARM_UP and not _failed:
            try:
                with _recording() as record:
                    self.replay = record(self.program)
            except RuntimeError:
                self.recordable = False
        (self.replay or self.program)()


def make_runner(batches: Batches, step: Step, wanted: bool, obstacle: str | None = None) -> Runner:
    """A Graph where one is `wanted` and can be, otherwise Eager, which says why. See Graph for when to call it.

    Args:
        obstacle: a reason of the caller's not to record steps.

    Raises UserError where steps of one of several ranks cannot be recorded.
    """
    if not wanted:
        why = "--no-graph"
    elif batches.device.type != "cuda":
        why = f"there are no CUDA graphs on a {batches.device.type.upper()}"
    elif obstacle is not None:
        why = obstacle
    elif _failed:  # the allocator takes that recording to be under way for as long as the process lives
        why = "an earlier recording in this process failed"
    else:
        try:
            return Graph(batches, step)
        except RuntimeError as error:
            why = f"recording failed: {_first_line(error)}"
            if step.world.size > 1:  # the others may be an exchange ahead, which none of our steps would fit
                raise UserError(f"rank {step.world.rank}: {why}; start with --no-graph") from error
    return Eager(batches, step, why)


def run_steps(runner: Runner, batches: Batches, steps: int, left: int) -> int:
    """Runs `steps` steps, first of an epoch with `left` batches left, then of epochs like it.

    Returns how many batches are left then.
    """
    while steps:
        if not left:
            batches.begin(0)
            left = batches.steps
        n = runner.run(min(steps, left))
        steps, left = steps - n, left - n
    return left


@contextmanager
def undone(batches: Batches, step: Step) -> Iterator[Callable[[], None]]:
    """Restores model, optimizer and batch state on exit; the yielded function restores it earlier.

    No gradients are left at its end. The weights' bf16 copies are right when it begins and after each restoration.
    """
    state = [*step.state(), batches.position, *batches.state().values()]
    kept = [t.detach().clone() for t in state]

    @torch.no_grad()
    def undo() -> None:
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        step.copies.refresh()

    step.copies.refresh()
    try:
        yield undo
    finally:
        step.zero_grad()
        undo()


def _first_line(error: BaseException) -> str:
    """First line of the root-cause error; CUDA's own error only says that the recording failed."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _recording() -> Iterator[Callable[[Callable[[], None]], Callable[[], None]]]:
    """A stream beside the current one, in which warm-up and recording have to be; the two wait for each other.

    Gives `record(program)`, which records what `program` would have the device do, without doing it, and returns what
    does it. What it returns may be called in any order, one at a time: all recordings share their working memory.
    """
    here, side, pool = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(program: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # what it frees may wait for an event, which a recording forbids
        try:
            # thread_local: what other threads ask of CUDA meanwhile (a loader pins memory) does no harm.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                program()
        except BaseException:
            _failed.append(graph)
            raise
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            yield record
    finally:
        torch.cuda.set_stream(here)  # a recording that failed may have left another
        here.wait_stream(side)
