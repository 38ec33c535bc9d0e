"""The report's pictures: the allocation, the search's history and the comparison, as PNG."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lmmjax.plan import BITS

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#8A8F98", "#1F2430"
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""
WIDTHS = tuple(sorted(BITS))
Report = Mapping[str, Any]


def draw(report: Report) -> dict[str, bytes]:
    """Returns every picture by name, as PNG."""
    return {"comparison": comparison(report), "allocation": allocation(report), "history": history(report)}


def allocation(report: Report) -> bytes:
    """Returns the sparsity of every layer and linear, beside the bits of every layer's keys and values."""
    table = np.array(report["allocation"]["sparsity"])
    layers = len(table)
    figure = Figure(figsize=(10, max(2.6, 1.5 + 0.34 * layers)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[7, 4], sharey=True)
    _sparsity(figure, left, table, report)
    _bits(right, report["allocation"])
    left.set_ylabel("decoder layer")
    left.set_yticks(range(layers))
    left.set_ylim(layers - 0.5, -0.5)
    return _png(figure)


def history(report: Report) -> bytes:
    """Returns every trial's value in order, the uniform starts marked, and the best so far."""
    trials = report["history"]
    values = np.array([trial["value"] for trial in trials], float)  # None, a trial that failed, is NaN: not drawn
    uniform = np.array([trial["uniform"] for trial in trials])
    number = np.arange(1, len(values) + 1)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(number[~uniform], values[~uniform], s=22, color=GREY, alpha=0.75, label="trial", linewidths=0)
    axes.scatter(number[uniform], values[uniform], s=60, color=ORANGE, marker="D", label="uniform", zorder=3)
    axes.step(number, np.fmin.accumulate(values), where="post", color=BLUE, linewidth=2, label="best so far")
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 5 * finite.min():
        axes.set_yscale("log")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{report['settings']['objective']} on the search set")
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    _clean(axes)
    return _png(figure)


def comparison(report: Report) -> bytes:
    """Returns accuracy and KL of every contender on the report set, with 95% intervals."""
    rows = report["rows"]
    figure = Figure(figsize=(10, 1.2 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, rows, "accuracy")
    _dots(right, rows, "kl")
    left.set_xlabel("questions answered right (more is better)")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.xaxis.set_major_locator(MaxNLocator(6))
    right.set_xlabel("KL from the dense model, nats a token (less is better)")
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    for label, row in zip(left.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["name"] == "searched" else "normal")
    left.set_ylim(len(rows) - 0.5, -0.5)
    return _png(figure)


def _sparsity(figure: Figure, axes: Axes, table: np.ndarray, report: Report) -> None:
    target = 1 - report["settings"]["budget"]
    reach = max(0.02, float(np.abs(table - target).max()))
    norm = TwoSlopeNorm(target, target - reach, target + reach)
    image = axes.imshow(table, aspect="auto", cmap="PuOr_r", norm=norm)
    for layer, values in enumerate(table):
        for index, value in enumerate(values):
            pale = abs(value - target) < 0.6 * reach
            shade = INK if pale else "white"
            axes.text(index, layer, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(table.shape[1]), report["allocation"]["linears"])
    axes.set_title(f"weights dropped, % (uniform: {100 * target:g})", fontsize=11, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    form = PercentFormatter(1.0, decimals=0)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=max(20, 3 * len(table)), format=form)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _bits(axes: Axes, table: Mapping[str, Any]) -> None:
    for offset, side, color in ((-0.19, "key_bits", BLUE), (0.19, "value_bits", ORANGE)):
        steps = [WIDTHS.index(bits) + 1 for bits in table[side]]
        at = np.arange(len(steps)) + offset
        axes.barh(at, steps, height=0.34, color=color, label=side.replace("_bits", "s"))
        for y, step, bits in zip(at, steps, table[side], strict=True):
            axes.text(step + 0.06, y, str(bits), va="center", fontsize=8, color=INK)
    axes.set_xticks(range(1, len(WIDTHS) + 1), [str(bits) for bits in WIDTHS])
    axes.set_xlim(0, len(WIDTHS) + 0.6)
    axes.set_title("bits of the cache", fontsize=11, loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.02, 1), ncols=2, borderaxespad=0, columnspacing=1)
    axes.tick_params(axis="y", length=0, labelleft=False)
    _clean(axes)


def _dots(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    for index, row in enumerate(rows):
        low, high = np.array(row[f"{key}_interval"], float)  # None, which is no number, is NaN: not drawn
        value = np.maximum(np.array(row[key], float), 0)
        color = {"searched": BLUE, "dense": GREEN}.get(row["name"], GREY)
        axes.plot([low, high], [index, index], color=color, linewidth=3, alpha=0.55, solid_capstyle="round")
        axes.plot(value, index, "o", color=color, markersize=8)
    axes.grid(axis="x", color="#E3E6EA", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#C4C9D1")
    axes.tick_params(colors=INK, labelsize=10)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=144)
    return buffer.getvalue()
