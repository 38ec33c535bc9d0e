"""The picture of a sensitivity: both measures over the layers, a line a width, keys beside values."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MEASURES = {
    "loss_change": "change of the loss\nto first order, nats a token",
    "attention_error": "relative error of\nthe attention's output",
}


def draw(figures: Mapping[str, Any]) -> bytes:
    """Returns the picture of the figures in sensitivity.json, as PNG."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(len(MEASURES), 2, sharex=True, sharey="row", squeeze=False)
    for row, (measure, label) in zip(grid, MEASURES.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, (side, layers) in zip(row, figures[measure].items(), strict=True):
            _lines(axes, layers, figures["bits"])
            axes.set_title(side, fontsize=11, loc="left")
        if any(value > 0 for layers in figures[measure].values() for widths in layers for value in widths):
            row[0].set_yscale("log")  # for both sides; what is 0, because no group was filled, is not drawn
    for axes in grid[-1]:
        axes.set_xlabel("decoder layer")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=len(labels))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _lines(axes: Axes, layers: list[list[float]], bits: list[int]) -> None:
    colors = matplotlib.colormaps["viridis_r"]
    for index, width in enumerate(bits):
        color = colors(0.1 + 0.9 * index / max(1, len(bits) - 1))
        values = [row[index] for row in layers]
        axes.plot(values, color=color, linewidth=1.6, marker="o", markersize=3, label=f"{width} bits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E3E6EA", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
