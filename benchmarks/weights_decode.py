"""Decoding from packed weights beside Hugging Face torch and llama.cpp: a process a side, by turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import spread

ROOT = Path(__file__).parents[1]
PRUNED = {
    "bitmap": ("--sparsity", "0.5"),
    "2:4": ("--pattern", "2:4"),
    "permuted": ("--pattern", "2:4", "--permute"),
}
"""How the model is pruned before it is packed; by magnitude, since speed is the same for every method."""
INT8, INT4 = (("--bits", bits, "--head", "8") for bits in "84")
PACKED = {
    "bitmap": ("bitmap", "bitmap", ()),
    "bitmap, int8": ("bitmap", "bitmap", INT8),
    "bitmap, int4": ("bitmap", "bitmap", INT4),
    "2:4": ("2:4", "2:4", ()),
    "2:4, int8": ("2:4", "2:4", INT8),
    "2:4 permuted, int8": ("permuted", "2:4", INT8),
    "dense, int8": ("dense", "dense", INT8),
    "dense, int4": ("dense", "dense", INT4),
}
"""Packed models by name: which pruned one they are of, the kind they are packed as, and with what flags."""


class Side(NamedTuple):
    """Who decodes, and what; `python` runs it."""

    side: str
    model: Path
    python: str = sys.executable


def measure(model: Path, work: Path, rounds: int, tokens: int, llama: tuple[str, Path] | None) -> dict[str, Any]:
    """Returns {side: figures}; every model that is missing in `work` is made first, by the project's own commands."""
    sides = dict(_sides(model, work, llama))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(_run(side, tokens))
            print(f"round {number + 1}: {name}: {min(found[name][-1]['ms']):.2f} ms a token", file=sys.stderr)
    return {name: _figures(runs) for name, runs in found.items()}


def _sides(model: Path, work: Path, llama: tuple[str, Path] | None) -> Iterator[tuple[str, Side]]:
    pruned = {"dense": model} | {name: _pruned(model, work, name) for name in PRUNED}
    yield "transformers, float32", Side("transformers-float32", _exported(pruned["bitmap"], work))
    yield "transformers, bfloat16", Side("transformers-bfloat16", _exported(pruned["bitmap"], work))
    if llama:
        yield "llama.cpp, Q8_0", Side("llama.cpp", llama[1], llama[0])
    yield "pruned, zeros in place", Side("lmmjax", pruned["bitmap"])
    for name, (of, kind, flags) in PACKED.items():
        out = work / name.replace(", ", "-").replace(":", "").replace(" ", "-")
        _command(out, "lmmjax.pack", "--model", str(pruned[of]), "--weights", kind, *flags, str(out))
        yield name, Side("lmmjax", out)


def _pruned(model: Path, work: Path, kind: str) -> Path:
    out = work / f"pruned-{kind.replace(':', '')}"
    words = [
        "--method",
        "magnitude",
        "--one-shot",
        "--light",
        "--samples",
        "1",
        "--statistics",
        str(work / "statistics"),
    ]
    _command(out, "lmmjax.prune", "--model", str(model), *words, *PRUNED[kind], str(out))
    return out


def _exported(model: Path, work: Path) -> Path:
    out = work / "hf"
    _command(out, "convert.export", str(model), str(out))
    return out


def _command(out: Path, *words: str) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, env=_environment())


def _run(side: Side, tokens: int) -> dict[str, Any]:
    words = [side.python, "-m", "benchmarks.decode_side", side.side, str(side.model), "--tokens", str(tokens)]
    done = subprocess.run(words, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over all rounds; the peak is the largest."""
    return {
        "ms_per_token": spread([ms for run in runs for ms in run["ms"]]),
        "weights_bytes": runs[0]["weights_bytes"],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "ids": runs[0]["ids"],
    }
