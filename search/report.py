"""The report of a search: one dict of plain values, from which the page, the pictures and the summary are made."""

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from optuna.trial import FrozenTrial

from lmmjax.files import write_atomic
from lmmjax.likelihood import Result
from lmmjax.plan import CacheFormat
from lmmjax.versions import installed
from search import comparison, page, pictures
from search.comparison import Contender
from search.page import kilobytes, number, percent, points
from search.problem import Problem
from search.space import Candidate

Report = dict[str, Any]
RIVALS = ("uniform wanda", "uniform wanda, slack filled")
"""The baselines that the headline is about: it names the better of them on the report set."""


def assemble(
    problem: Problem,
    trials: list[FrozenTrial],
    best: Candidate,
    compared: Iterable[tuple[Contender, Result]],
    extra: Mapping[str, Any],
) -> Report:
    """Returns the report; `extra` holds what only the command knows (what was asked for, its own text, timings).

    Numbers that are not finite are None: JSON has no others.
    """
    space = problem.space
    results = {contender.name: (contender, result) for contender, result in compared}
    starts = len(space.uniform())
    report = {
        "trials": len(trials),
        "sets": problem.sets.origin,
        "rows": [comparison.row(*pair, space, problem.settings.tokens) for pair in results.values()],
        "differences": comparison.differences({name: result for name, (_, result) in results.items()}),
        "allocation": comparison.allocation(best, space),
        "history": [_history(trial, index < starts) for index, trial in enumerate(trials)],
        "versions": {name: installed(name) or "source tree" for name in ("lmmjax", "jax", "optuna", "numpy")},
        "device": jax.devices()[0].device_kind,
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **extra,
    }
    words = {"title": _title(report), "headline": _headline(report), "notes": _notes(problem, report)}
    return _plain(report | words)


def write(out: Path, report: Report) -> None:
    """Writes report.html, its pictures, and last report.json, whose presence says that all is there."""
    drawn = pictures.draw(report)
    for name, png in drawn.items():
        write_atomic(out / f"{name}.png", png)
    write_atomic(out / "report.html", page.render(report, drawn))
    write_atomic(out / "report.json", json.dumps(report, indent=1))


def summary(report: Report) -> str:
    """Returns the comparison as text, and what it comes to."""
    perplexity = "ppl" in report["rows"][0]
    head = f"{'KL':>10}" + (f"{'ppl':>10}" if perplexity else "")
    lines = [f"{'':<28}{'weights':>9}{'KV bytes':>18}{head}{'right':>9}{'95% interval':>17}"]
    for row in report["rows"]:
        low, high = row["accuracy_interval"]
        cache = f"{kilobytes(row['kv_bytes'])} ({percent(row['kv_share'])})"
        losses = f"{number(row['kl']):>10}" + (f"{number(row['ppl']):>10}" if perplexity else "")
        lines.append(
            f"{row['name']:<28}{percent(row['weights_kept'], 2):>9}{cache:>18}{losses}"
            f"{percent(row['accuracy']):>9}{f'[{100 * low:.1f}, {100 * high:.1f}]':>17}"
        )
    lines.append("")
    for name, row in report["differences"].items():
        lines.append(
            f"searched - {name}: {points(row['accuracy'], row['accuracy_interval'])} right,"
            f" KL {number(row['kl'], '+.4f')}"
        )
    return "\n".join(lines)


def cache_words(form: CacheFormat, head_dim: int) -> str:
    """Returns how a cache is quantized, in a sentence or two; what is off is not spoken of."""
    levels = " at the levels of the normal distribution" if form.codebook == "normal" else ""
    clipped = ", each group's range narrowed to where the squared error is least" if form.clip else ""
    turned = {"online": "rotated as they come", "folded": "rotated by the weights"}
    sides = form.key_quantizer(head_dim), form.value_quantizer(head_dim)
    keys, values = ([f"groups of {side.group} {side.axis}"] for side in sides)
    keys += [form.keys.replace("_rope", " RoPE")]
    keys += ["rotated"] if form.rotate_keys else []
    values += ["those of image tokens along tokens"] if form.visual_values == "tokens" else []
    values += [turned[form.rotate_values]] if form.rotate_values in turned else []
    exact = [f"the first {form.sinks}"] if form.sinks else []
    exact += [f"the latest {form.window}"] if form.window else []
    kept = f" Exact tokens: {' and '.join(exact)}." if exact else ""
    return (
        f"The cache is rounded{levels}: keys in {', '.join(keys)}; values in {', '.join(values)}; spans and zeros in"
        f" {form.metadata}{clipped}.{kept}"
    )


def _title(report: Report) -> str:
    settings = report["settings"]
    cache = "" if settings["kv_budget"] == settings["budget"] else f", cache {settings['kv_budget']:g}"
    return f"{Path(settings['model']).name} at budget {settings['budget']:g}{cache}"


def _headline(report: Report) -> str:
    rows = {row["name"]: row for row in report["rows"]}
    ours, dense = rows["searched"], rows["dense"]
    best = max((rows[name] for name in RIVALS if name in rows), key=lambda row: row["accuracy"])["name"]
    rival = report["differences"][best]
    return (
        f"{percent(ours['weights_kept'], 2)} of the prunable weights and {percent(ours['kv_share'])} of the KV cache's"
        f" bytes are kept. Of the questions in the report set {percent(ours['accuracy'])} are answered right (dense"
        f" {percent(dense['accuracy'])}); against {best} under the same budgets that is"
        f" {points(rival['accuracy'], rival['accuracy_interval'])}."
    )


def _notes(problem: Problem, report: Report) -> dict[str, str]:
    space = problem.space
    rows = {row["name"]: row for row in report["rows"]}
    best = min(trial["value"] for trial in report["history"])
    uniform = min((trial["value"] for trial in report["history"] if trial["uniform"]), default=best)
    plain, filled = RIVALS
    widths = f"{rows[plain]['key_bits'][0]}-bit keys and {rows[plain]['value_bits'][0]}-bit values"
    slack = (
        " 'Slack filled' spends the bytes that these leave over on wider sides, as ours does." if filled in rows else ""
    )
    counted = "all text tokens" if problem.settings.tokens == "text" else "the tokens of the answers"
    return {
        "comparison": (
            f"Every pruned row keeps the same share of the {space.weights.text.prunable:,} prunable weights (the seven"
            " linears of each decoder layer), every quantized cache fits the same budget at the stated context, scales,"
            " zeros and exact tokens counted. Uniform rows have the same sparsity everywhere;"
            f" {plain} has {widths}, the best uniform widths that fit, chosen on the search set like ours.{slack}"
            f" KL is over {counted}."
            " 'Right' means that the greedy answer is the known one, to the end of the sequence; 95% intervals: Wilson"
            " for shares, bootstrap for KL."
        ),
        "differences": "Paired by question; 95% intervals by the bootstrap.",
        "allocation": (
            "Orange linears lose more than uniform pruning would take from them, violet ones less. The weights are"
            " zeros in place: the checkpoint on disk is as large as before, the cache is really packed."
            f" {cache_words(problem.settings.form, space.weights.text.head_dim)}"
        ),
        "history": (
            f"Every trial lies exactly on both budgets. Best {report['settings']['objective']} {best:.4g}, best uniform"
            f" start {uniform:.4g}. The starts are uniform in sparsity, the cache's slack filled up."
        ),
    }


def _history(trial: FrozenTrial, uniform: bool) -> dict[str, Any]:
    facts = {name: trial.user_attrs[name] for name in ("kl", "accuracy", "seconds")}
    return {"value": trial.value, "uniform": uniform, **facts}


def _plain(value: Any) -> Any:
    """Returns the value, every number in it that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
