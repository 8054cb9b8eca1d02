import os
import signal
import subprocess
import sys
import threading

import pytest

from bvae.engine.interrupts import STOP_SIGNALS, stopping


@pytest.fixture(autouse=True)
def handlers():
    """Known handlers before each test, and the session's own after it."""
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def current():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_leaves_a_note_and_the_block_goes_on(number):
    before, seen = current(), []
    with stopping(seen.append):
        os.kill(os.getpid(), number)
        assert seen == [number]
    assert current() == before


def test_a_second_ctrl_c_is_a_keyboard_interrupt():
    before, seen = current(), []
    with pytest.raises(KeyboardInterrupt), stopping(seen.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert seen == [signal.SIGINT]
    assert current() == before


def test_ctrl_c_after_the_block_is_the_callers():
    with stopping(lambda number: None):
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    before = current()
    with pytest.raises(KeyError), stopping(lambda number: None):
        raise KeyError
    assert current() == before


def test_a_callers_own_handler_takes_the_second_signal():
    theirs, ours = [], []
    signal.signal(signal.SIGTERM, lambda number, _: theirs.append(number))
    with stopping(ours.append):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(ours) == 1
    assert len(theirs) == 3


def test_in_another_thread_the_block_runs_without_handlers():
    before, found = current(), []

    def work():
        with stopping(lambda number: None):
            found.append(current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


SECOND = """
import os, signal
from bvae.engine.interrupts import stopping
signal.signal(signal.SIGINT, signal.{before})
with stopping(lambda number: print("noted", flush=True)):
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""


@pytest.mark.parametrize("before", ["SIG_IGN", "SIG_DFL"])
def test_a_second_signal_ends_a_process_that_ignored_it(before):
    done = subprocess.run([sys.executable, "-c", SECOND.format(before=before)], capture_output=True, text=True)
    assert done.stdout.split("\n") == ["noted", "goes on", ""]
    assert done.returncode == -signal.SIGINT
