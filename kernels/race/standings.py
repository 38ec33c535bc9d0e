"""What came of a race: figures and their ratios, in a file that is whole after every job."""

import datetime
import json
import os
import platform
import shlex
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from kernels.race.jobs import PEERS
from kernels.race.timing import Entrant

WRONG = 0.05
"""A larger relative error, or none at all, is a wrong result, whose time means nothing."""
PACKAGES = ("jax", "jaxlib", "numpy", "torch")


def figures(taken: Sequence[float], entrant: Entrant, copy: float) -> dict[str, Any]:
    """Returns what an entrant's seconds a call, round by round, mean beside the copy's bytes a second."""
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
    return {
        "us": 1e6 * median,
        "us_quartiles": [1e6 * low, 1e6 * high],
        "rounds": len(taken),
        "bytes": entrant.nbytes,
        "gbps": entrant.nbytes / median / 1e9,
        "of_copy": entrant.nbytes / median / copy,
        "error": entrant.error.whole,
        "error_of_rounding": entrant.error.rounding,
        "launched": entrant.note,
    }


def fastest(entrants: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the name of the entrant with the least time; None if all failed."""
    times = {name: one["us"] for name, one in entrants.items() if "us" in one}
    return min(times, key=times.__getitem__, default=None)


def speedup(entrants: Mapping[str, Mapping[str, Any]], way: str, peer: str | None) -> float | None:
    """Returns how many times as fast as the peer a way was in the same rounds; None if one of both did not run."""
    own, other = (entrants.get(name or "", {}).get("us") for name in (way, peer))
    return None if own is None or other is None else other / own


class Standings:
    """The results file: its `runs`, what came of each of its `jobs`, and the names of those that are `left_out`."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path, self._data = path, data

    @classmethod
    def open(cls, path: Path, resume: bool) -> "Standings":
        """Returns the standings in a file, or new ones.

        Raises:
            ValueError: there is a file that is not to be resumed, or cannot be: no results, or another device's.
            OSError: it cannot be written.
        """
        data: dict[str, Any] = {"runs": [], "jobs": {}, "left_out": []}
        if path.exists():
            if not resume:
                raise ValueError(f"--out: {path} exists; go on with it by --resume, or give another name")
            data = cls.load(path)._data
            device, here = ([run["device"] for run in data["runs"]] or [None])[-1], jax.devices()[0].device_kind
            if device not in (None, here):
                raise ValueError(f"--out: {path} was measured on {device}, this is {here}; give another name")
        standings = cls(path, data)
        standings._save()
        return standings

    @classmethod
    def load(cls, path: Path) -> "Standings":
        """Returns the standings in a file, of whatever device; raises ValueError if there are none."""
        try:
            data = json.loads(path.read_text())
            data = {"runs": list(data["runs"]), "jobs": dict(data["jobs"]), "left_out": list(data["left_out"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out: {path} holds no results of this benchmark ({error!r})") from None
        return cls(path, data)

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        return self._data["jobs"]

    @property
    def latest_run(self) -> dict[str, Any]:
        """When, how and on what the latest figures were taken."""
        return self._data["runs"][-1]

    @property
    def copy(self) -> float:
        """Bytes a second of the latest run's copy, read and written."""
        return 1e9 * self.latest_run["copy_gbps"]

    def begin(self, arguments: Sequence[str], copy: float) -> None:
        """Notes a run: when, how and on what, and its copy's bytes a second."""
        self._data["runs"].append(
            {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": shlex.join(["python", "-m", "kernels.bench", *arguments]),
                "device": jax.devices()[0].device_kind,
                "python": platform.python_version(),
                "versions": dict(_versions()),
                "copy_gbps": copy / 1e9,
            }
        )
        self._save()

    def add(self, name: str, job: Mapping[str, Any], left_out: Sequence[str]) -> None:
        self.jobs[name] = {"run": len(self._data["runs"]) - 1, **job}
        self.leave_out(left_out)

    def leave_out(self, names: Sequence[str]) -> None:
        """Notes the jobs that have no result, should this be all."""
        self._data["left_out"] = list(names)
        self._save()

    def best_peer(self, shape: str) -> str | None:
        """Returns the name of the fastest peer on a shape."""
        return fastest(self.jobs.get(f"{shape} {PEERS}", {}).get("entrants", {}))

    def has(self, name: str, peers: Collection[str]) -> bool:
        """Returns whether a job has its result: of all these peers, or of ours beside the one that is the best now."""
        job = self.jobs.get(name, {})
        if "entrants" not in job:
            return False
        if job["way"] == PEERS:
            return set(peers) <= set(job["entrants"]) and fastest(job["entrants"]) is not None
        return "us" in job["entrants"][job["way"]] and job["peer"] == self.best_peer(job["shape"])

    def measured(self) -> list[dict[str, Any]]:
        """Returns the jobs that have a time of ours."""
        ours = (job for job in self.jobs.values() if job["way"] != PEERS and "entrants" in job)
        return [job for job in ours if "us" in job["entrants"][job["way"]]]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.partial")
        with open(temporary, "w") as file:
            file.write(json.dumps(self._data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
