"""How the clock goes: everyone by turns, round after round, many calls before one wait."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels.cases import relative_error
from kernels.race import noise


class Error(NamedTuple):
    """|out - exact| / |exact|, Frobenius, of a result, and of nothing but rounding the exact one to bfloat16."""

    whole: float
    rounding: float

    @classmethod
    def of(cls, out: Float[np.ndarray, "*any"], exact: Float[np.ndarray, "*any"]) -> "Error":
        """Returns the error of a result; `exact` is in float64."""
        return cls(relative_error(out, exact), relative_error(exact.astype(jnp.bfloat16), exact))


class Entrant(NamedTuple):
    """Something to time. `run` puts `calls` calls into the device's queue, `wait(run())` returns when they are done.

    `nbytes` is what one call must read of the cache, `note` how it is launched.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int
    nbytes: int
    error: Error
    note: str = ""


def race(entrants: Mapping[str, Entrant], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Returns the seconds a call of each entrant took, round by round.

    The clock is the host's for all. Each turn queues calls for at least `seconds` and waits once, so that a launch and
    the wait weigh next to nothing; in every round all have their turn, so that the device's clocks are the same.
    """
    repeats = {name: _repeats(entrant, seconds) for name, entrant in entrants.items()}
    taken: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, entrant in entrants.items():
            taken[name].append(_turn(entrant, repeats[name]) / entrant.calls / repeats[name])
    return taken


def copy_bandwidth(nbytes: int, rounds: int, seconds: float) -> float:
    """Returns the bytes a second, read and written, of the device's fastest copy of `nbytes` to itself."""
    ways = {"copy": jnp.copy, "kernel": lambda x: x ^ 1}
    taken = race({name: _copying(way, nbytes) for name, way in ways.items()}, rounds, seconds)
    return 2 * nbytes / min(statistics.median(turns) for turns in taken.values())


def _copying(way: Callable[[Any], Any], nbytes: int) -> Entrant:
    program, held = jax.jit(way), [noise.bits(0, (nbytes // 4,))]

    def run() -> Any:
        held[0] = program(held[0])
        return held[0]

    return Entrant(run, jax.block_until_ready, 1, nbytes, Error(0, 0))


def _repeats(entrant: Entrant, seconds: float) -> int:
    """Returns how many runs fill a turn; warms up, too."""
    _turn(entrant, 1)
    return max(1, math.ceil(seconds / min(_turn(entrant, 1) for _ in range(3))))


def _turn(entrant: Entrant, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats - 1):
        entrant.run()
    entrant.wait(entrant.run())
    return time.perf_counter() - began
