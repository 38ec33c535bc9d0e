"""The tables of docs/results.md and README.md from benchmarks/results/*.json: python -m benchmarks.results"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_headlines, gpu_table, kv_table, prune_table, weights_table
from benchmarks.machine import RESULTS
from benchmarks.tables import interval, machine, share, source, sparsities, spread, table, text
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic

TARGET = Path(__file__).parents[1] / "docs" / "results.md"
INTRODUCTION = """# What compression costs

Made by `python -m benchmarks.results` from the files in [benchmarks/results](../benchmarks/results); `python -m
benchmarks.quality`, `python -m benchmarks.prune_quality`, `python -m benchmarks.prune_layers`, `python -m
benchmarks.kv_quality` and `python -m benchmarks.weights` measure.

Pruned models keep a dense KV cache and quantized caches stand under dense weights, so that each table shows one loss.
*Searched* is what TPE found: a sparsity a layer for the score lognorm, or widths for each layer's keys and values in
no more bytes than the uniform cache's. 2:4 and the narrowest cache leave it nothing to choose. Uniform pruning takes
the same share of every linear; the scores' statistics are one-shot, those of the dense model. A prompt's own queries
see what is rounded.

*Right* is the share of easy-VQA's test questions whose whole answer, greedily chosen, is the known one; KL is from
the dense model, in nats an answer token. Mean ± deviation over seeds, where there are several: a seed draws the
questions for calibration and search, and the trials.
"""
HEADLINES = "nvidia-h200"
"""The device whose figures the README shows."""
AXES = {"weights": ("Weights", "sparsity"), "cache": ("KV cache", "bits")}
KINDS = ("yes/no", "shape", "colour")


def main() -> int:
    """Writes docs/results.md and the table in README.md; returns 0."""
    return exit_code(write)


def write() -> int:
    write_atomic(TARGET, page(RESULTS))
    write_atomic(gpu_headlines.README, gpu_headlines.shown(gpu_headlines.README.read_text(), RESULTS, HEADLINES))
    print(TARGET, gpu_headlines.README, sep="\n")
    return 0


def page(folder: Path) -> str:
    """Returns the whole page of a folder's figures."""
    parts = [INTRODUCTION, *(_model(name, found) for name, found in _found(folder, "quality-*.json"))]
    methods = _found(folder, "prune-quality-*.json")
    parts += [f"## Pruning methods\n\n{prune_table.LEGEND}"] if methods else []
    parts += [
        f"### {found['settings']['model']}, methods\n\n{prune_table.page(name, found)}" for name, found in methods
    ]
    alone = _found(folder, "prune-layers-*.json")
    parts += [f"### Allocations, layer by layer\n\n{prune_table.LAYERS}"] if alone else []
    parts += [f"{found['settings']['model']}:\n\n{prune_table.layers(name, found)}" for name, found in alone]
    raced = _found(folder, "prune-smol-*.json", "prune-7b-*.json")
    parts += [f"### Speed of pruning\n\n{prune_table.SPEED}"] if raced else []
    parts += [prune_table.speed(name, found) for name, found in raced]
    held = _found(folder, "prune-memory*.json")
    parts += [f"### Memory\n\n{prune_table.MEMORY}"] if held else []
    parts += [prune_table.memory(name, found) for name, found in held]
    formats = _found(folder, "kv-quality-*.json")
    parts += [f"## KV cache formats\n\n{kv_table.LEGEND}"] if formats else []
    parts += [f"### {found['settings']['model']}, formats\n\n{kv_table.page(found)}\n" for _, found in formats]
    packed = _found(folder, "weights-cpu*.json")
    parts += [f"## Packed weights\n\n{weights_table.LEGEND}"] if packed else []
    parts += [weights_table.page(name, found) for name, found in packed]
    parts += [on_gpus] if (on_gpus := gpu_table.page(folder)) else []
    return "\n".join(parts)


def _found(folder: Path, *patterns: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns files of figures and their names."""
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [(path.name, json.loads(path.read_text())) for path in paths]


def _model(name: str, found: Mapping[str, Any]) -> str:
    tables = (_table(axis, found) for axis in AXES if any(row["axis"] == axis for row in found["cells"]))
    return "\n".join([f"## {found['settings']['model']}\n", *tables, _small_print(name, found)])


def _table(axis: str, found: Mapping[str, Any]) -> str:
    """Returns the table of one axis, levels from mild to severe; the dense model comes first."""
    has_text = found["settings"]["text"] is not None
    heading, level = AXES[axis]
    columns = [level, "", "right", *KINDS, "KL", *(["perplexity"] if has_text else [])]
    rows = [row for row in found["cells"] if row["axis"] in (axis, "dense")]
    lines = []
    for level in _levels(axis, rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["level"] == level):
            of = [row for row in rows if (row["level"], row["method"]) == (level, method)]
            lines.append([share(level) if axis == "weights" else level, method, *_figures(of, has_text)])
    return f"### {heading}\n\n{table(columns, lines)}"


def _levels(axis: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if axis == "weights":
        return sparsities(rows)
    return sorted({row["level"] for row in rows}, key=lambda bits: -float(bits or "inf"))


def _figures(rows: Sequence[Mapping[str, Any]], has_text: bool) -> list[str]:
    shares = [spread([100 * row["right"] for row in rows], ".1f", "%")]
    shares += [spread([100 * row["by_kind"][kind] for row in rows], ".1f", "%") for kind in KINDS]
    losses = [spread([row["kl"] for row in rows], ".3g")]
    return shares + losses + ([spread([row["ppl"] for row in rows], ".2f")] if has_text else [])


def _small_print(name: str, found: Mapping[str, Any]) -> str:
    """Returns what the tables' figures rest on."""
    chosen, about = found["settings"], found["about"]
    return (
        f"{interval(chosen['samples'])} {chosen['calibration']} questions for calibration, {chosen['search']} for a"
        f" trial, {chosen['trials']} trials a search. {text(chosen['text'])} {machine(about)}; `{about['command']}`;"
        f" {source(name)}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
