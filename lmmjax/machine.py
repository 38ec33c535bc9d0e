"""What a figure must carry to be read later: the date, the machine, the versions and the command."""

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmmjax.versions import installed

PACKAGES = ("lmmjax", "jax", "jaxlib", "flax", "numpy", "optuna", "torch", "transformers")


def facts(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns where and how `python -m module arguments` runs; packages that are not installed are left out.

    The machine's name is none of them.
    """
    import jax

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }


def size(count: float) -> str:
    """Returns bytes with a unit that leaves few digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
