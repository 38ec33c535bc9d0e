"""How bad input ends: one line on stderr that says argument, got, expected and what to do, and exit code 2."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one complete line."""


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        return command()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
