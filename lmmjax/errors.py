"""How bad input ends: one line on stderr that says argument, got, expected and what to do, and exit code 2."""

import sys
from collections.abc import Callable
from importlib import metadata


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one complete line."""


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 after bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        _refuse_other_kernels()
        return command()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refuse_other_kernels() -> None:
    """Raises InputError where Hugging Face's `kernels` is installed too: one of the two would import the other's."""
    try:
        found = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise InputError(
        f"the distribution 'kernels' {found} (Hugging Face's) is installed here and lmmjax has a package of that name;"
        " use an environment of its own for lmmjax, or `pip uninstall kernels`"
    )
