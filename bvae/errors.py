"""What a user's mistake or machine may cause, and how a command line ends on it."""

import sys
from collections.abc import Callable
from typing import NoReturn

import torch


class UserError(Exception):
    """An error the user can mend. Its text is one clear line; command lines print it to stderr and exit with 2."""


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Runs a command line's main and exits: its result (None is 0), 2 with one line on a UserError, 130 on Ctrl-C."""
    try:
        code = command() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except torch.OutOfMemoryError as error:
        reason = str(error).split(".")[0]
        print(f"error: the GPU is out of memory ({reason}): lower --batch or --base, or use --amp", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
