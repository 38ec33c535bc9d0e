"""The tables of docs/results.md from benchmarks/results/quality-*.json: python -m benchmarks.results"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kv_table, machine
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic
from lmmjax.intervals import wilson

TARGET = Path(__file__).parents[1] / "docs" / "results.md"
INTRODUCTION = """# What compression costs

Made by `python -m benchmarks.results` from the files in [benchmarks/results](../benchmarks/results); `python -m
benchmarks.quality` and `python -m benchmarks.kv_quality` measure.

Pruned models keep a dense KV cache and quantized caches stand under dense weights, so that each table shows one loss.
*Searched* is what TPE found: a sparsity a layer for the score lognorm, or widths for each layer's keys and values in
no more bytes than the uniform cache's. 2:4 and the narrowest cache leave it nothing to choose. Uniform pruning takes
the same share of every linear; the scores' statistics are one-shot, those of the dense model. A prompt's own queries
see what is rounded.

*Right* is the share of easy-VQA's test questions whose whole answer, greedily chosen, is the known one; KL is from
the dense model, in nats an answer token. Mean ± deviation over seeds, where there are several: a seed draws the
questions for calibration and search, and the trials.
"""
AXES = {"weights": ("Weights", "sparsity"), "cache": ("KV cache", "bits")}
KINDS = ("yes/no", "shape", "colour")


def main() -> int:
    """Writes docs/results.md; returns 0."""
    return exit_code(write)


def write() -> int:
    write_atomic(TARGET, page(machine.RESULTS))
    print(TARGET)
    return 0


def page(folder: Path) -> str:
    """Returns the whole page of a folder's quality-*.json."""
    parts = [INTRODUCTION]
    parts += [_model(path, json.loads(path.read_text())) for path in sorted(folder.glob("quality-*.json"))]
    formats = [json.loads(path.read_text()) for path in sorted(folder.glob("kv-quality-*.json"))]
    parts += [f"## KV cache formats\n\n{kv_table.LEGEND}"] if formats else []
    parts += [f"### {found['settings']['model']}, formats\n\n{kv_table.page(found)}\n" for found in formats]
    return "\n".join(parts)


def _model(path: Path, found: Mapping[str, Any]) -> str:
    tables = (_table(axis, found) for axis in AXES if any(row["axis"] == axis for row in found["cells"]))
    return "\n".join([f"## {found['settings']['model']}\n", *tables, _small_print(path, found)])


def _table(axis: str, found: Mapping[str, Any]) -> str:
    """Returns the table of one axis, levels from mild to severe; the dense model comes first."""
    text = found["settings"]["text"] is not None
    heading, level = AXES[axis]
    columns = [level, "", "right", *KINDS, "KL", *(["perplexity"] if text else [])]
    rows = [row for row in found["cells"] if row["axis"] in (axis, "dense")]
    levels = sorted({row["level"] for row in rows}, key=lambda level: _severity(axis, level))
    lines = [f"### {heading}\n", _line(columns), _line(["---"] * len(columns))]
    for level in levels:
        for method in dict.fromkeys(row["method"] for row in rows if row["level"] == level):
            of = [row for row in rows if (row["level"], row["method"]) == (level, method)]
            lines.append(_line([_level(axis, level), method, *_figures(of, text)]))
    return "\n".join(lines) + "\n"


def _figures(rows: Sequence[Mapping[str, Any]], text: bool) -> list[str]:
    shares = [_spread([100 * row["right"] for row in rows], ".1f", "%")]
    shares += [_spread([100 * row["by_kind"][kind] for row in rows], ".1f", "%") for kind in KINDS]
    losses = [_spread([row["kl"] for row in rows], ".3g")]
    return shares + losses + ([_spread([row["ppl"] for row in rows], ".2f")] if text else [])


def _spread(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """Returns mean ± deviation; a value that was too large for a number makes the mean so too."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "∞"
    deviation = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{deviation}{unit}"


def _severity(axis: str, level: str) -> float:
    """Returns the order of levels: the dense model, then ascending sparsity, patterns, or descending bits."""
    if not level:
        return -1000
    return 1 if ":" in level else float(level) if axis == "weights" else -float(level)


def _level(axis: str, level: str) -> str:
    return f"{100 * float(level):g}%" if axis == "weights" and level and ":" not in level else level


def _small_print(path: Path, found: Mapping[str, Any]) -> str:
    """Returns what the tables' figures rest on."""
    chosen, about, n = found["settings"], found["about"], found["settings"]["samples"]
    low, high = wilson(n // 2, n)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{n} questions: the 95% interval of a share is at most ±{50 * (high - low):.1f} points, narrower near 0 and"
        f" 100%. {chosen['calibration']} questions for calibration, {chosen['search']} for a trial,"
        f" {chosen['trials']} trials a search. {_text(chosen['text'])}"
        f" {about['cpu']}, {about['cores_used']} cores, {about['device']}; {versions}; {about['date'][:10]};"
        f" `{about['command']}`;"
        f" [{path.name}](../benchmarks/results/{path.name}).\n"
    )


def _text(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "No perplexity: no text was given."
    files = text["files"]
    return (
        f"Perplexity of {len(files)} files, {files[0]} to {files[-1]}: {text['windows']} windows of {text['context']}"
        f" tokens spread evenly over all, stride {text['stride']}."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
