"""What a device does in a program: kernels by name with their counts and times, and how long none of them ran."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

MOST = 40
"""Kernels that are listed, the dearest first."""


def profiled(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Returns, for each of so many steps of a run: launches, microseconds by kernel, busy, and from end to end."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return summary(_kernels(Path(folder)), steps)


def summary(events: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Returns the summary of kernels (name, start, duration in nanoseconds)."""
    taken, counts, ordered = defaultdict(float), defaultdict(int), sorted(events, key=lambda one: one[1])
    end = busy = 0.0
    for name, start, duration in ordered:
        kind = re.sub(r"[_.]?\d+$", "", name)
        taken[kind] += duration
        counts[kind] += 1
        # Kernels of several streams may run at the same time.
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    whole = end - ordered[0][1] if ordered else 0.0
    names = sorted(taken, key=lambda name: -taken[name])[:MOST]
    return {
        "launches": len(ordered) / steps,
        "whole_us": whole / 1e3 / steps,
        "busy_us": busy / 1e3 / steps,
        "kernels": {name: {"count": counts[name] / steps, "us": taken[name] / 1e3 / steps} for name in names},
    }


def _kernels(folder: Path) -> Iterable[tuple[str, float, float]]:
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.start_ns, event.duration_ns) for event in line.events)
