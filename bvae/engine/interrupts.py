"""Signals that ask a running loop to stop at its next safe point."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stopping(stop: Callable[[int], object]) -> Iterator[None]:
    """Inside the block, the first SIGINT or SIGTERM calls `stop(number)` instead of ending the process.

    `stop` must only leave a note, for it runs between any two lines of the block. A second signal of the same kind acts
    as before the block, and ends the process where it was ignored then. All handlers are put back at the block's end.
    Only the main thread can change handlers: in another thread the block runs without, and signals go where they went.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        previous = before[number]
        signal.signal(number, signal.SIG_DFL if previous is signal.SIG_IGN else previous)
        stop(number)

    try:
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:  # None: set by C code, so that Python could not put it back
                before[number] = handler
                signal.signal(number, note)
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)
