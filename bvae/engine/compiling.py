"""Whether torch.compile makes a stage's passes: where that is left open, by timing steps with and without.

Which is faster depends on processor, network and torch: nobody has to know it.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bvae.batches.resident import Batches
from bvae.engine.graph import Runner, make_runner, run_steps, undone
from bvae.engine.step import Step
from bvae.errors import UserError

MIN_STAGE_STEPS = 1_000  # a shorter stage tries nothing
MIN_STAGE_SECONDS = 1_800.0  # a few percent of a longer stage exceed the compilation, on a GPU too
MAX_TIME_RATIO = 0.98  # compiled over plain: a smaller gain is left alone
ROUNDS = 7
TURN = 2.0  # seconds, about


class Way(NamedTuple):
    """How a stage's steps are run."""

    runner: Runner
    compiled: bool


def compile_step(batches: Batches, step: Step) -> str | None:
    """Has torch.compile make the step's passes: before a Graph, which then records them, and called when it may be.

    Changes nothing else. Returns None, or in one line why it cannot be done: the step is then what it was. Where
    several ranks train together they call it together, and it is done on all of them or on none.
    """
    plain = step.minimise
    with undone(batches, step):
        why = step.compile(*batches.draw())
    (failed,) = step.world.largest(int(why is not None))
    if failed and why is None:
        step.minimise, why = plain, "another rank could not"
    return why


def choose_way(
    batches: Batches, step: Step, graph: bool, wanted: bool | None, total: int, note: Callable[[str], None]
) -> Way:
    """The runner of a stage's steps, and whether they are compiled. To be called in training mode.

    Changes nothing but the gradients and what Batches.begin sets, which is to be called after it.

    Args:
        graph: replay steps from a CUDA graph where that can be.
        wanted: whether to compile them; None leaves that to a trial, if the stage is long enough for it to pay.
        total: steps of the stage.
        note: is told in a line what takes minutes, and what came of it.
    """
    batches.begin(0)
    if wanted is None:
        return _faster(batches, step, graph, total, note)
    if wanted:
        note("compiling, which may take minutes")
        if (why := compile_step(batches, step)) is not None:
            note(f"not compiled: {why}")
            wanted = False
    return Way(make_runner(batches, step, graph), wanted)


def _faster(batches: Batches, step: Step, graph: bool, total: int, note: Callable[[str], None]) -> Way:
    plain = Way(make_runner(batches, step, graph), False)
    if total < MIN_STAGE_STEPS:
        return plain
    with undone(batches, step):
        duration = _duration(plain.runner, batches, step)
    if duration * total < MIN_STAGE_SECONDS:
        return plain
    note("trying whether torch.compile makes it faster, which may take minutes")
    objectives = {plain: step.minimise}
    if (why := compile_step(batches, step)) is not None:
        note(f"not compiled: {why}")
        return plain
    try:
        compiled = Way(make_runner(batches, step, graph), True)
    except UserError as error:
        raise UserError(f"{error}, or with --no-compile: its steps were compiled") from error
    objectives[compiled] = step.minimise
    if compiled.runner.why_eager is not None and plain.runner.why_eager is None:
        note(f"not compiled: {compiled.runner.why_eager}")
        step.minimise = objectives[plain]
        return plain

    turn = max(1, round(TURN / duration))
    times: dict[Way, list[float]] = {plain: [], compiled: []}
    with undone(batches, step):
        for round_ in range(1 + ROUNDS):
            for way, seconds in times.items():
                step.minimise = objectives[way]
                took = _seconds(way.runner, batches, step, turn) / turn
                if round_:  # the first warms up
                    seconds.append(took)
    before, after = (statistics.median(seconds) for seconds in times.values())
    # Of turns beside each other: a machine whose speed drifts slows both alike.
    ratio = statistics.median(c / p for p, c in zip(times[plain], times[compiled], strict=True))
    way = compiled if ratio < MAX_TIME_RATIO else plain
    step.minimise = objectives[way]
    note(
        f"{'compiled' if way.compiled else 'not compiled'}: a step takes {1e3 * before:.2f} ms without torch.compile, "
        f"{1e3 * after:.2f} ms with it, {ratio:.2f} times as long in turns"
    )
    return way


def _duration(runner: Runner, batches: Batches, step: Step) -> float:
    """Seconds a step, once the first ones are over: of as many as fill a tenth of a turn."""
    _seconds(runner, batches, step, 1)
    steps = 1
    while (seconds := _seconds(runner, batches, step, steps)) < TURN / 10:
        steps *= 4
    return seconds / steps


def _seconds(runner: Runner, batches: Batches, step: Step, steps: int) -> float:
    """What so many steps take, on the slowest rank: the same figure on all of them."""
    batches.begin(0)
    _wait(batches.device)
    started = time.perf_counter()
    run_steps(runner, batches, steps, batches.steps)
    _wait(batches.device)
    (microseconds,) = step.world.largest(round(1e6 * (time.perf_counter() - started)))
    return microseconds / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
