"""The picture of a training run: loss, held-out accuracy, and the final figures beside the controls."""

import json
from pathlib import Path

import numpy as np

from lmmjax.data import KINDS


def draw(log: Path, final: dict, picture: Path) -> None:
    """Draws loss and held-out accuracy over the steps, and the final test figures beside the controls."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    checks = [line for line in lines if "all" in line]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, held, test = figure.subplots(1, 3)
    for stage in dict.fromkeys(line["stage"] for line in lines):
        part = [line for line in lines if line["stage"] == stage]
        losses.plot([line["step"] for line in part], [line["loss"] for line in part], label=stage)
    losses.set(title="training loss", xlabel="step", yscale="log")
    losses.legend(fontsize=8)
    for kind in ("all", *KINDS):
        held.plot([line["step"] for line in checks], [line[kind] for line in checks], marker=".", label=kind)
    held.legend(fontsize=8)
    held.set(title="answered right, held-out training images", xlabel="step", ylim=(0, 1.02))
    names = [name for name in final if name != "questions"]
    for index, name in enumerate(names):
        places = np.arange(len(KINDS) + 1) + 0.27 * (index - 1)
        bars = test.bar(places, list(final[name].values()), 0.26, label=name)
        test.bar_label(bars, fmt="%.2f", fontsize=7)
    test.set(
        title=f"answered right, {final['questions']:,} test questions", ylim=(0, 1.25), yticks=np.arange(0, 1.1, 0.2)
    )
    test.set_xticks(range(len(KINDS) + 1), ["all", *KINDS])
    test.legend(fontsize=8, loc="upper center", ncols=len(names), frameon=False)
    for axes in (losses, held, test):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
