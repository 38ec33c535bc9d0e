"""A race for every job: those that take part are made, run by turns, and leave their figures in the standings."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kernels.race import entrants, timing
from kernels.race.caches import Shape, abstract
from kernels.race.jobs import PEERS, Job, Size
from kernels.race.standings import WRONG, Standings, figures, speedup
from kernels.race.timing import Entrant

FREE = 0.9
"""Share of the device's memory that a job may plan to fill."""


class Peers(Protocol):
    """What a module of peers has: makers by name, for a shape and a working set, and a way to free the buffers."""

    PEERS: dict[str, Callable[[Shape, int], Entrant]]

    def release(self) -> None: ...


class Contest:
    """Holds jobs. The peers that the latest shape needs stay ready: to make one takes longer than to time it."""

    def __init__(self, size: Size, modules: Sequence[Peers], standings: Standings):
        self._size, self._modules, self._standings = size, modules, standings
        self.makers = {name: make for module in modules for name, make in module.PEERS.items()}
        self._shape: Shape | None = None
        self._ready: dict[str, Entrant] = {}

    def hold(self, job: Job) -> dict[str, Any]:
        """Returns what is kept of a job: figures of all that took part, or the reason why none did."""
        if job.shape != self._shape:
            self._shape, self._ready = job.shape, {}
            for module in self._modules:
                module.release()
        about = {"shape": job.shape.name, "cached": job.shape.cached, "way": job.way}
        if job.way == PEERS:
            measured = self._measure({name: self._peer(name, job.shape) for name in self.makers})
            self._ready = {}
            return {**about, "entrants": measured}
        about |= {"bits": job.bits, "scheme": job.scheme.name if job.scheme else None}
        reason = entrants.why_not(job.way, job.shape, job.scheme, job.bits) or self._too_large(job)
        if reason:
            return {**about, "reason": reason}
        best = self._standings.best_peer(job.shape.name)
        made = {job.way: _attempt(lambda: self._ours(job))}
        if best in self.makers:
            made[best] = self._peer(best, job.shape)
        measured = self._measure(made)
        return {**about, "entrants": measured, "peer": best, "speedup": speedup(measured, job.way, best)}

    def _ours(self, job: Job) -> Entrant:
        return entrants.ours(job.way, job.shape, job.scheme, job.bits, self._size.working_set)

    def _peer(self, name: str, shape: Shape) -> Entrant | str:
        if name not in self._ready:
            made = _attempt(lambda: self.makers[name](shape, self._size.working_set))
            if isinstance(made, str):
                return made
            self._ready[name] = made
        return self._ready[name]

    def _measure(self, made: Mapping[str, Entrant | str]) -> dict[str, Any]:
        able = {name: one for name, one in made.items() if not isinstance(one, str)}
        failed = {name: {"failed": one} for name, one in made.items() if isinstance(one, str)}
        try:
            taken = timing.race(able, self._size.rounds, self._size.seconds)
        except Exception as error:  # as in `_attempt`
            return failed | {name: {"failed": _first_line(error)} for name in able}
        copy = self._standings.copy
        return {name: figures(taken[name], one, copy) for name, one in able.items()} | failed

    def _too_large(self, job: Job) -> str | None:
        """Returns why a job does not fit beside its peer; None, too, where the device does not say what it has."""
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        caches = (abstract(job.shape, job.scheme, job.bits).nbytes, job.shape.nbytes)
        needed = sum(nbytes * entrants.sets(nbytes, self._size.working_set) for nbytes in caches)
        if job.way in (entrants.DEQUANTIZE, "reference"):
            needed += 2 * job.shape.nbytes  # all of it in float32
        if limit is None or needed <= FREE * limit:
            return None
        return f"takes about {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB"


def run(jobs: Sequence[Job], contest: Contest, standings: Standings, deadline: float) -> None:
    """Holds the jobs that have no result yet, until the next would likely end after the deadline."""

    def missing(some: Sequence[Job]) -> list[Job]:
        return [job for job in some if not standings.has(job.name, contest.makers)]

    standings.leave_out([job.name for job in missing(jobs)])
    longest = {True: 0.0, False: 0.0}
    for i, job in enumerate(jobs):
        if standings.has(job.name, contest.makers):
            continue
        began, kind = time.monotonic(), job.way == PEERS
        if began + longest[kind] >= deadline:
            left = missing(jobs[i:])
            say(f"out of time: {len(left)} of {len(jobs)} jobs are left out, {job.name!r} first")
            return
        result = contest.hold(job)
        standings.add(job.name, result, [other.name for other in missing(jobs[i + 1 :])])
        longest[kind] = max(longest[kind], time.monotonic() - began)
        say(f"{job.name}: {_summary(result)}")
        if "entrants" in result and not any("us" in one for one in result["entrants"].values()) and not _answers():
            say("the device answers no more: start again with --resume")
            return


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _attempt(make: Callable[[], Entrant]) -> Entrant | str:
    """Returns an entrant that runs and is right, or what is wrong with it: nobody else need stop for it."""
    try:
        made = make()
    except Exception as error:
        return _first_line(error)
    return made if made.error.whole <= WRONG else f"wrong result: relative error {made.error.whole:.2g}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _answers() -> bool:
    """Returns whether the device still computes; after an illegal access it does not in this process."""
    try:
        return bool(jnp.ones(2).sum() == 2)
    except Exception:
        return False


def _summary(result: Mapping[str, Any]) -> str:
    if "reason" in result:
        return f"left out, {result['reason']}"
    parts = [
        f"{name} {one['us']:.4g} us ({one['of_copy']:.2f})" if "us" in one else f"{name} failed: {one['failed'][:100]}"
        for name, one in result["entrants"].items()
    ]
    times = result.get("speedup")
    return ", ".join(parts) + (f": {times:.2f}x" if times else "")
