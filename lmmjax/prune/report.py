"""What pruning did, as text and as JSON: exact sparsities and output errors by layer and linear."""

from collections.abc import Sequence
from typing import Any

from lmmjax.config import LINEARS
from lmmjax.prune.losses import Loss


def sparsity(losses: Sequence[Loss]) -> float:
    """Returns the dropped share of all these weights."""
    return sum(loss.dropped for loss in losses) / sum(loss.weights for loss in losses)


def text(losses: Sequence[Loss]) -> str:
    """Returns a line a layer: its sparsity, then each linear's sparsity and relative output error."""
    head = f"{'layer':>5} {'sparsity':>9}" + "".join(f"{name:>15}" for name in LINEARS)
    lines = ["each linear: sparsity, relative error of its output on the calibration's tokens", "", head]
    layers = sorted({loss.layer for loss in losses})
    for layer in layers:
        of = {loss.linear: loss for loss in losses if loss.layer == layer}
        cells = "".join(f"{_cell(of.get(name)):>15}" for name in LINEARS)
        lines.append(f"{layer:>5} {sparsity(list(of.values())):>9.4f}{cells}")
    return "\n".join([*lines, f"{'all':>5} {sparsity(losses):>9.4f}"])


def as_json(losses: Sequence[Loss]) -> dict[str, Any]:
    """Returns the figures as plain values: of all, and a row a linear."""
    rows = [{**loss._asdict(), "sparsity": loss.sparsity} for loss in losses]
    return {"sparsity": sparsity(losses), "linears": rows}


def _cell(loss: Loss | None) -> str:
    if loss is None:
        return "-"
    return f"{loss.sparsity:.4f}" + ("" if loss.error is None else f" {loss.error:.4f}")
