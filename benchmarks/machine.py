"""What a figure must carry to be read later: the date, the machine, the versions and the command."""

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmmjax.files import write_atomic
from lmmjax.versions import installed

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optuna", "torch", "transformers")


def facts() -> dict[str, Any]:
    """Returns where and how this process runs; packages that are not installed are left out."""
    import jax

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


def save(name: str, figures: Any) -> Path:
    """Writes benchmarks/results/NAME.json, figures beside the facts; returns its path."""
    path = RESULTS / f"{name}.json"
    write_atomic(path, json.dumps({"about": facts(), **figures}, indent=1) + "\n")
    return path


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """Returns the median of repeated measurements, and the measurements."""
    return {"median": statistics.median(runs), "runs": list(runs)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
