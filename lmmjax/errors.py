"""How bad input ends: one line on stderr that says argument, got, expected and what to do, and exit code 2."""

import os
import sys
from collections.abc import Callable

from lmmjax.versions import installed


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one complete line."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what another library's exception says; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_unicode(text: str) -> bool:
    """Returns whether a string is text: JSON and argv can hold lone surrogates, which no tokenizer takes."""
    return text.encode(errors="ignore").decode() == text


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 after bad input (one line on stderr), 130 after Ctrl-C.

    Where nobody reads its output any more (`| head`) it ends quietly with 141, as if killed by SIGPIPE.
    """
    try:
        code = _outcome(command)
        print(end="", flush=True)  # what is still buffered, while a closed pipe can be told from a bug
        return code
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both once more at its end
            os.dup2(nowhere, stream.fileno())
        return 141


def _outcome(command: Callable[[], int]) -> int:
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
    found = installed("kernels")
    if found is None:
        return
    raise InputError(
        f"the distribution 'kernels' {found} (Hugging Face's) is installed here and lmmjax has a package of that name;"
        " use an environment of its own for lmmjax, or `pip uninstall kernels`"
    )
