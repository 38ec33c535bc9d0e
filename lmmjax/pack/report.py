"""What packing has come to, as text and as JSON: one row a linear."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from kernels.weights import Matrix
from lmmjax.config import LINEARS
from lmmjax.machine import size


class Row(NamedTuple):
    """A linear as it is packed: its format, the share of zeros, and bytes before and after. The head has no layer.

    `permuted` says that its inputs have an order of their own.
    """

    layer: int | None
    linear: str
    kind: str
    bits: int
    group: int | None
    sparsity: float
    dense_bytes: int
    nbytes: int
    permuted: bool = False

    @property
    def share(self) -> float:
        """Bytes after, of those before."""
        return self.nbytes / self.dense_bytes


def row(layer: int | None, linear: str, kernel: Float[np.ndarray, "in out"], matrix: Matrix) -> Row:
    """Returns what packing a linear has come to."""
    group = matrix.group if matrix.bits <= 8 else None
    zeros = 1 - np.count_nonzero(kernel) / kernel.size
    permuted = matrix.order is not None
    return Row(layer, linear, matrix.kind, matrix.bits, group, zeros, kernel.nbytes, matrix.nbytes, permuted)


def text(rows: Sequence[Row], sparse: bool = True) -> str:
    """Returns a line a layer: each linear's format and its bytes as a share of the dense ones.

    `sparse` says that formats without zeros were wished for.
    """
    head = f"{'layer':>5} {'bytes':>6}" + "".join(f"{name:>17}" for name in LINEARS)
    lines = ["each linear: format, bits of a value, bytes as a share of what they were", "", head]
    linears = [one for one in rows if one.layer is not None]
    for layer, of_layer in itertools.groupby(linears, key=lambda one: one.layer):
        of = {one.linear: one for one in of_layer}
        cells = "".join(f"{_cell(of[name]):>17}" for name in LINEARS)
        lines.append(f"{layer:>5} {_share(of.values()):>6.3f}{cells}")
    head = [f"head: {_cell(one)}" for one in rows if one.layer is None]
    return "\n".join([*lines, f"{'all':>5} {_share(linears):>6.3f}", "", *_facts(linears, sparse), *head])


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures as plain values: of all linears, a row each, and the head's if it is packed."""
    linears = [one for one in rows if one.layer is not None]
    heads = [one for one in rows if one.layer is None]
    sums = {name: sum(getattr(one, name) for one in linears) for name in ("dense_bytes", "nbytes")}
    named = {"linears": linears, "head": heads}
    each = {name: [{**one._asdict(), "share": one.share} for one in of] for name, of in named.items()}
    return {**sums, "share": _share(linears), **each}


def _share(rows: Iterable[Row]) -> float:
    rows = list(rows)
    return sum(one.nbytes for one in rows) / sum(one.dense_bytes for one in rows)


def _cell(one: Row) -> str:
    return f"{one.kind}{'*' if one.permuted else ''} {one.bits} {one.share:.3f}"


def _facts(rows: Sequence[Row], sparse: bool) -> list[str]:
    before, after = (sum(getattr(one, name) for one in rows) for name in ("dense_bytes", "nbytes"))
    whole = [one for one in rows if one.kind == "dense" and one.sparsity > 0]
    lines = [f"linears: {size(before)} -> {size(after)}"]
    if any(one.permuted for one in rows):
        lines.append("*: its inputs in an order of its own, as they were pruned")
    if sparse and whole:
        most = max(one.sparsity for one in whole)
        lines.append(f"kept whole, since a mask would cost more than it saves: {len(whole)} (up to {most:.1%} zeros)")
    return lines
