"""The number of threads that a CPU's steps take: all of this process, or one where other work keeps the cores busy.

OpenMP's threads wait for each other at the end of every operation. Where one of them shares its core with another
program, all wait for it, and two threads can be several times slower than one.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bvae.machine import set_threads

STEPS = 2  # of a turn
ROUNDS = 3
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


def choose_threads(
    run: Callable[[int], object],
    wanted: int | None,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Sets and returns the number of threads for the steps of a run; to be called once, before its first step.

    Keep the number with the run and give it as `wanted` on a resume: sums over other numbers of threads differ by
    roundings.

    Args:
        run: as in `look`.
        wanted: the number; None leaves it as it is, or takes one thread where that is faster on these busy cores.
        note: is told in a line where one thread was taken.

    Raises:
        UserError: for a `wanted` that this process cannot have.
    """
    if wanted is not None:
        set_threads(wanted)
        return wanted
    found = look(run, clock)
    if found is None or not found.busy:
        return torch.get_num_threads()
    set_threads(1)
    note(f"one thread: other work keeps the cores busy, {found} (--threads {found.threads} keeps them)")
    return 1
