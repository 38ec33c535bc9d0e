"""The tables of pruning methods: a score a row with each update beside it, and allocations side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks import tables
from benchmarks.prune_memory import SHAPE
from lmmjax.prune.allocations import ALLOCATIONS
from lmmjax.prune.updates import UPDATES

Row = Mapping[str, Any]
Measures = Sequence[tuple[str, str]]
LEGEND = """Every score of `python -m lmmjax.prune` alone and with the weights that stay updated, uniform over all
linears; *own mask* is the update that chooses by itself; *permuted*, the pattern holds in an order of inputs that was
looked for. Then allocations of the same exact sparsity over layers, by
the score lognorm, without an update. Statistics are one-shot, those of the dense model, so that all methods of a seed
rest on the same; a seed draws what is calibrated on. ecoflap's losses are taken of 16 questions, whatever the
statistics are of. *-*: not measured.
"""
LAYERS = """An allocation gains where it drops less of the layers whose weights are missed more. Each decoder layer
pruned alone by lognorm, all others dense, says how much they are missed; the rank correlation (Spearman) of that with
what an allocation drops of a layer is -1 where it drops least of the dearest, 1 where it drops most of them.
"""
RIGHT, TEXT = ("right", "easy-VQA, right"), ("ppl", "perplexity")
DEAREST = 4
"""How many of the layers that cost most are named."""
OWN, PERMUTED = "own mask", ", permuted"
KL = ("kl", "easy-VQA, KL")
"""What stands in for perplexity where there is no text: nats an answer token from the dense model's predictions."""

MEMORY = """Decoders of LLaVA-1.5 7B's width in two depths, random weights in bfloat16, pruned to a half by commands of
their own: a layer at a time is held, in float32, so the peak does not grow with the file. Hidden states do with the
samples.
"""
SPEED = """One linear from its Gram matrix to its pruned weights, float32, by turns with torch implementations written
to the papers: medians, each linear alone, though SparseGPT and ADMM share work among linears of the same inputs.
"""


def page(name: str, found: Mapping[str, Any]) -> str:
    """Returns both tables of a file of `benchmarks.prune_quality`, and what they rest on."""
    cells, measures = found["cells"], (RIGHT, TEXT if found["settings"]["text"] else KL)
    return "\n".join([_updates(cells, measures), _allocations(cells, measures), _small_print(name, found)])


def layers(name: str, found: Mapping[str, Any]) -> str:
    """Returns the table of a file of `benchmarks.prune_layers`, and what it rests on."""
    rows, cost = found["layers"], "text_kl" if found["settings"]["text"] else "kl"
    names = [name for name in ALLOCATIONS if name != "uniform"]
    lines, dearest = [], []
    for level in tables.sparsities(rows):
        of = [row for row in rows if row["level"] == level]
        dropped = {name: [row["dropped"][name] for row in of] for name in names}
        together = [_rank_correlation(dropped[name], [row[cost] for row in of]) for name in names]
        spans = [f"{100 * min(each):.0f} to {100 * max(each):.0f}%" for each in dropped.values()]
        most = sorted(of, key=lambda row: row[cost], reverse=True)[:DEAREST]
        first = [f"{100 * most[0]['dropped'][name]:.0f}%" for name in names]
        lines += [
            [tables.share(level), "rank correlation", *together],
            [tables.share(level), "dropped of a layer", *spans],
            [tables.share(level), f"of layer {most[0]['layer']}, the dearest", *first],
        ]
        each = ", ".join(f"{row['layer']} ({row[cost]:.3f})" for row in most)
        of_what = "text" if cost == "text_kl" else "answers"
        dearest.append(f"Dearest at {tables.share(level)}, by KL of {of_what}: layers {each}.")
    return f"{tables.table(['sparsity', '', *names], lines)}\n{' '.join(dearest)} {_small_print(name, found)}"


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> str:
    """Returns Spearman's coefficient, those alike to a thousandth sharing their ranks; "-" where all of a side are."""
    first, second = (rankdata(np.round(x, 3)) for x in (a, b))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return "-"
    return f"{np.corrcoef(first, second)[0, 1]:+.2f}"


def memory(name: str, found: Mapping[str, Any]) -> str:
    """Returns the table of a file of `benchmarks.prune_memory`, and what it rests on."""
    head = ["method", "layers", "checkpoint", "peak"]
    rows = sorted(found["rows"], key=lambda row: (row["method"], row["layers"]))
    lines = [
        [row["method"], str(row["layers"]), f"{row['gigabytes']:.1f} GB", f"{row['peak_gigabytes']:.1f} GB"]
        for row in rows
    ]
    about, settings = found["about"], found["settings"]
    rests = [
        f"Calibrated on {settings['windows']} x {settings['length']} tokens; of the 128 x 2,048 that published pruners"
        f" take, hidden states are {128 * 2048 * SHAPE['hidden_size'] * 4 / 1e9:.1f} GB in float32.",
        f"{tables.machine(about)}; `{about['command']}`; {tables.source(name)}.\n",
    ]
    return f"{tables.table(head, lines)}\n{' '.join(rests)}"


def speed(name: str, found: Mapping[str, Any]) -> str:
    """Returns the table of a file of `benchmarks.prune`, and what it rests on."""
    linears = {row["linear"]: row["shape"] for row in found["rows"]}
    head = ["torch's time / ours", *(f"{linear} {inputs} x {outputs}" for linear, (inputs, outputs) in linears.items())]
    ways = dict.fromkeys((row["method"], row["pattern"]) for row in found["rows"])
    lines = [[" ".join(filter(None, way)), *(_ratio(found["rows"], way, linear) for linear in linears)] for way in ways]
    about, least = found["about"], min(row["same_mask"] for row in found["rows"])
    rests = f"The same weights go on both sides, for {100 * least:.2f}% of them at least. {tables.machine(about)}"
    return f"{tables.table(head, lines)}\n{rests}; `{about['command']}`; {tables.source(name)}.\n"


def _ratio(rows: Sequence[Row], way: tuple[str, str | None], linear: str) -> str:
    """Returns how many times as fast ours is, and our median; "-" where it was not measured."""
    for row in rows:
        if (row["method"], row["pattern"], row["linear"]) == (*way, linear):
            ms = 1e3 * row["lmmjax"]["seconds"]["median"]
            return f"{row['speedup']:.1f}x ({ms:.{0 if ms >= 100 else 1}f} ms)"
    return "-"


def _updates(cells: Sequence[Row], measures: Measures) -> str:
    columns = ("none", *UPDATES)
    head = ["sparsity", "score", *(f"{what}: {_named(update)}" for _, what in measures for update in columns)]
    dense = next(row for row in cells if not row["level"])
    lines = [["", "dense", *(cell for measure, _ in measures for cell in (_figure([dense], measure), "", ""))]]
    uniform = [row for row in cells if row["level"] and row["allocation"] == "uniform"]
    for level in tables.sparsities(uniform):
        of = [row for row in uniform if row["level"] == level]
        masks = sorted(dict.fromkeys(map(_mask, of)), key=lambda mask: (mask == OWN, mask.endswith(PERMUTED)))
        for mask in masks:
            with_it = [row for row in of if _mask(row) == mask]
            lines.append([tables.share(level), mask, *_line(with_it, columns, measures)])
    return tables.table(head, lines)


def _mask(row: Row) -> str:
    """Returns what a row's mask is called."""
    if row["score"] in UPDATES:
        return OWN
    return row["score"] + (PERMUTED if row.get("permute") else "")


def _line(of: Sequence[Row], columns: Sequence[str], measures: Measures) -> list[str]:
    """Returns the figures of a mask, alone and under each update."""

    def chosen(update: str) -> list[Row]:
        return [row for row in of if row["update"] == update]

    return [_figure(chosen(update), measure) for measure, _ in measures for update in columns]


def _allocations(cells: Sequence[Row], measures: Measures) -> str:
    head = ["sparsity", "", *ALLOCATIONS]
    rows = [row for row in cells if row["score"] == "lognorm" and row["update"] == "none" and ":" not in row["level"]]
    lines = [
        [
            tables.share(level),
            what,
            *(
                _figure([row for row in rows if (row["level"], row["allocation"]) == (level, name)], measure)
                for name in ALLOCATIONS
            ),
        ]
        for level in tables.sparsities(rows)
        for measure, what in measures
    ]
    return tables.table(head, lines)


def _figure(rows: Sequence[Row], measure: str) -> str:
    if not rows or measure not in rows[0]:
        return "-"
    if measure == "right":
        return tables.spread([100 * row["right"] for row in rows], ".1f", "%")
    return tables.spread([row[measure] for row in rows], ".1f" if measure == "ppl" else ".3f")


def _named(update: str) -> str:
    return "alone" if update == "none" else f"+ {update}"


def _small_print(name: str, found: Mapping[str, Any]) -> str:
    chosen, about = found["settings"], found["about"]
    files, each = len(chosen["calibration"]), chosen["length"]
    windows = f" and {chosen['calibration_windows']} windows of {each} tokens of {files} files"
    return (
        f"{tables.interval(chosen['samples'])} Calibrated on {chosen['calibration_samples']} questions"
        f"{windows if chosen['calibration'] else ''}. {tables.text(chosen['text'])} {tables.machine(about)};"
        f" {tables.source(name)}.\n"
    )
