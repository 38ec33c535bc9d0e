"""How a benchmark keeps its figures: beside the date, the machine, the versions and the command."""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmmjax import machine
from lmmjax.files import write_atomic

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Returns where and how this benchmark runs."""
    return machine.facts(f"benchmarks.{Path(sys.argv[0]).stem}", sys.argv[1:])


def save(name: str, figures: Any) -> Path:
    """Writes benchmarks/results/NAME.json, figures beside the facts; returns its path."""
    path = RESULTS / f"{name}.json"
    write_atomic(path, json.dumps({"about": facts(), **figures}, indent=1) + "\n")
    return path


def slug(device: str) -> str:
    """Returns a device's name as part of a file's."""
    return re.sub(r"\W+", "-", device.lower())


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """Returns the median of repeated measurements, and the measurements."""
    return {"median": statistics.median(runs), "runs": list(runs)}
