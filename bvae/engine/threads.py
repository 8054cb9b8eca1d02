"""A look at the threads of a CPU's steps: whether other work keeps the cores busy, so that one would be faster.

OpenMP's threads wait for each other at the end of every operation. Where one of them shares its core with another
program, all wait for it, and two threads can be several times slower than one.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bvae.batches.resident import Batches
from bvae.engine.compiling import MIN_STAGE_STEPS
from bvae.engine.graph import undone
from bvae.engine.step import Step

STEPS = 2  # of a turn
ROUNDS = 3
LOOK_STEPS = 1 + 2 * ROUNDS * STEPS  # at most, of one look
BUSY = 1.25  # times as long a step with all threads as with one, from which the cores count as busy


class Look(NamedTuple):
    """Seconds of a step with `threads` threads and with one: medians over the rounds; `ratio`: that of their ratios."""

    threads: int
    seconds: float
    seconds_one: float
    ratio: float

    @property
    def busy(self) -> bool:
        return self.ratio > BUSY

    def __str__(self) -> str:
        return (
            f"a step takes {1e3 * self.seconds:.1f} ms with {self.threads} threads and {1e3 * self.seconds_one:.1f} ms "
            "with one"
        )


def look(run: Callable[[int], object], clock: Callable[[], float] = time.perf_counter) -> Look | None:
    """Times steps with all threads of this process and with one, in turns; None where there is one only.

    Ends after the first turns where all threads are not slower. The number of threads is the same afterwards.

    Args:
        run: runs that many training steps. The caller undoes them: a run's numbers must not depend on the look.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    times: dict[int, list[float]] = {threads: [], 1: []}
    try:
        run(1)
        for _ in range(ROUNDS):
            for number, seconds in times.items():
                torch.set_num_threads(number)
                started = clock()
                run(STEPS)
                seconds.append((clock() - started) / STEPS)
            if times[threads][0] <= times[1][0]:
                break
    finally:
        torch.set_num_threads(threads)
    ratio = statistics.median(many / max(one, 1e-12) for many, one in zip(*times.values(), strict=True))
    return Look(threads, statistics.median(times[threads]), statistics.median(times[1]), ratio)


def note_busy_cores(batches: Batches, step: Step, total: int, note: Callable[[str], None]) -> None:
    """Says where one thread would be faster: on a CPU whose cores other work keeps busy, where a long stage begins.

    Changes nothing else: the steps that it times are undone. To be called in training mode.

    Args:
        total: steps of the stage.
    """
    alone = batches.device.type == "cpu" and step.world.size == 1
    if not alone or total < MIN_STAGE_STEPS or batches.steps <= LOOK_STEPS:
        return

    def run(steps: int) -> None:
        for _ in range(steps):
            batches.fetch()
            step(*batches.draw())

    with undone(batches, step):
        batches.begin(0)
        found = look(run)
    if found is not None and found.busy:
        note(f"{found}: other work keeps the cores busy, and --threads 1 would be faster")
