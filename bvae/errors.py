"""Errors that a user's mistake or machine may cause, and how a command line ends on them."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

TRACEBACK = "BVAE_TRACEBACK"  # an environment variable: where it is set, an unforeseen error shows where it arose


class UserError(Exception):
    """An error the user can mend. Its text is one clear line; command lines print it to stderr and exit with 2."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


def run_command(command: Callable[[], int | None], less_memory: str = "use fewer or smaller images") -> NoReturn:
    """Runs a command line's main and exits: its result (None is 0), 2 with one line on an error, 130 on Ctrl-C.

    Args:
        less_memory: what the user of this command may do where memory runs out.

    An error that nobody has foreseen is one line too; with BVAE_TRACEBACK set its traceback follows.
    """
    from bvae.files import hold_standard_descriptors

    hold_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names may hold what the terminal has no sign for
    try:
        code = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:  # whoever read the output, as `head` does, wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 2
    except Exception as error:
        _say("error: " + " ".join(_line(error, less_memory).split()))
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        code = 2
    sys.exit(code)


def _line(error: Exception, less_memory: str) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_about_memory(reason)):
        return f"not enough memory ({reason or 'out of memory'}): {less_memory}"
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror or error}"
    return f"unforeseen {type(error).__name__} ({reason or 'without a word'}); {TRACEBACK}=1 shows where it arose"


def _is_about_memory(reason: str) -> bool:
    return "out of memory" in reason or "allocate memory" in reason


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr is closed at its other end: there is nobody to tell
        print(line, file=sys.stderr)
