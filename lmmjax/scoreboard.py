"""An evaluation's results: figures with 95% intervals, the difference from the baseline, sizes and speed."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmmjax.contender import Outcome
from lmmjax.files import write_atomic
from lmmjax.intervals import Interval
from lmmjax.machine import size
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import Sheet, differences, intervals

PLAIN = ("perplexity", "perception", "cognition", "score", "acc", "acc+")
"""Figures that are no shares: MME's count to 200 a category."""


def figures(sheets: Mapping[str, Sequence[Sheet]]) -> dict[str, dict[str, Any]]:
    """Returns by figure, and by contender, value and interval; with a baseline also the model's difference from it."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in sheets.items():
        for sheet in own:
            ranges = intervals(sheet)
            for figure, value in sheet.values.items():
                found.setdefault(figure, {})[name] = _entry(value, ranges[figure])
    if "baseline" in sheets:
        for ours, other in zip(sheets["model"], sheets["baseline"], strict=True):
            for figure, (value, interval) in differences(ours, other).items():
                found[figure]["difference"] = _entry(value, interval)
    return found


def write_answers(path: Path, model_id: str, questions: Sequence[Question], texts: Sequence[str]) -> None:
    """Writes answers in LLaVA's format, in the questions' order; the same answers give the same file."""
    lines = []
    for index, (question, text) in enumerate(zip(questions, texts, strict=True)):
        identity = hashlib.sha256(f"{model_id}\n{index}\n{question.id}\n{question.text}".encode()).hexdigest()[:22]
        row = {"question_id": question.id, "prompt": question.text, "text": text, "answer_id": identity}
        lines.append(json.dumps({**row, "model_id": model_id, "metadata": {}}, ensure_ascii=False))
    write_atomic(path, "\n".join(lines) + "\n")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the results as JSON."""
    write_atomic(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def table(found: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> str:
    """Returns the results for people to read: a line a figure, a column a contender."""
    columns = [*outcomes, *(["difference"] if "baseline" in outcomes else [])]
    rows = [["", *columns]]
    rows += [[name, *[_cell(name, row.get(column), column) for column in columns]] for name, row in found.items()]
    for name, of in _facts(outcomes).items():
        rows.append([name, *[of.get(column, "") for column in columns]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _facts(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, str]]:
    tokens = next(iter(outcomes.values())).size["kv_tokens"]
    return {
        "weights kept": {name: f"{100 * one.size['weights_kept']:.2f}%" for name, one in outcomes.items()},
        "weights": {name: size(one.size["weights_bytes"]) for name, one in outcomes.items()},
        f"KV of {tokens} tokens": {name: size(one.size["kv_bytes"]) for name, one in outcomes.items()},
        "tokens/s read": {name: _rate(one.speed["read_tokens_per_second"]) for name, one in outcomes.items()},
        "tokens/s written": {name: _rate(one.speed["written_tokens_per_second"]) for name, one in outcomes.items()},
    }


def _entry(value: float, interval: Interval) -> dict[str, Any]:
    return {"value": _number(value), "interval": [_number(end) for end in interval]}


def _number(value: float) -> float | None:
    """Returns a number that JSON has: none for a figure that is not defined, or beyond all bounds."""
    return value if math.isfinite(value) else None


def _cell(name: str, entry: Mapping[str, Any] | None, column: str) -> str:
    if entry is None:
        return ""
    is_share = name.split(":")[0] not in PLAIN
    sign = "+" if column == "difference" else ""

    def shown(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{100 * value if is_share else value:{sign}.2f}"

    low, high = entry["interval"]
    return f"{shown(entry['value'], sign)}{'%' if is_share else ''} [{shown(low)}, {shown(high)}]"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
