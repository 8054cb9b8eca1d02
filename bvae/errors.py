"""What a user's mistake or machine may cause, and how a command line ends on it."""

import io
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """An error the user can mend. Its text is one clear line; command lines print it to stderr and exit with 2."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Runs a command line's main and exits: its result (None is 0), 2 with one line on a UserError, 130 on Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names may hold what the terminal has no sign for
    try:
        code = command() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        if not (isinstance(error, MemoryError) or "out of memory" in reason or "allocate memory" in reason):
            raise
        print(f"error: not enough memory ({reason}): use fewer or smaller images, or --amp", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"error: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
