"""What a command sets up before it computes: compiled programs kept on disk, GPU memory as needed, quiet imports."""

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from lmmjax.checkpoint import cache_dir
from lmmjax.errors import InputError


def prepare() -> None:
    """Sets this process up as a command; to be called first in `main`. What the user's environment sets stays.

    Compiled programs are kept in the user's cache directory, so the next process with the same shapes
    compiles nothing. JAX would take most of a GPU's memory at once; here it takes what it needs.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        # By default only what took a second to compile is kept, but dozens of small programs add up.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "LMMJAX_CPU" in os.environ:
        _check_cpu_path()
    compile_seconds()


def _check_cpu_path() -> None:
    from kernels.cpu import library

    try:
        library.missing()
    except ValueError as error:
        raise InputError(str(error)) from error


def compile_seconds() -> float:
    """Returns the seconds that this process has spent on tracing, lowering and compiling, since the first call."""
    return sum(end - start for start, end in _spans())


class Stopwatch:
    """Milliseconds by name; what of them went into compiling is under "compile" instead."""

    def __init__(self):
        self.ms: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, program: Callable, *args, **kwargs) -> Any:
        """Returns the program's result once it is there."""
        compiled, began = compile_seconds(), time.perf_counter()
        result = jax.block_until_ready(program(*args, **kwargs))
        compiled = compile_seconds() - compiled
        self.ms["compile"] += 1e3 * compiled
        self.ms[name] += 1e3 * (time.perf_counter() - began - compiled)
        return result


@functools.cache
def _spans() -> list[tuple[float, float]]:
    """Returns the list to which a listener adds the start and end of every compilation, from now on."""
    spans: list[tuple[float, float]] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            start = end - duration_secs
            # Tracing a function inside a traced one is reported too, before the outer one, which contains it.
            while spans and spans[-1][0] >= start:
                spans.pop()
            spans.append((start, end))

    jax.monitoring.register_event_duration_secs_listener(note)
    return spans
