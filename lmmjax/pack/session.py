"""One run of the pack command: every linear in its format, layer by layer, and what it saves."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernels.weights import Matrix, WeightFormat
from lmmjax import checkpoint, files, machine, orders, runtime, weights
from lmmjax.config import LINEARS, TextConfig
from lmmjax.errors import InputError
from lmmjax.linears import path_of
from lmmjax.pack import choice, report
from lmmjax.pack.choice import Wish
from lmmjax.pack.report import Row


def run(args: argparse.Namespace) -> int:
    """Packs, writes OUT, and prints the report."""
    runtime.prepare()
    files.refuse_existing(args.out)
    wish = _asked(args)
    path = checkpoint.resolve(args.model)
    if weights.is_packed(path / "params"):
        raise InputError(f"--model: {path} is packed already; give the checkpoint it was packed from")
    rows = _write(args, path, wish)
    print(report.text(rows, wish.kind != "dense"))
    print(f"all weights on disk: {_on_disk(path)} -> {_on_disk(args.out)}\n\nwritten: {args.out}")
    return 0


def _asked(args: argparse.Namespace) -> Wish:
    if args.group is not None and args.bits is None:
        raise InputError(f"--group: got {args.group} without scales to share; give --bits 8 or 4, too")
    try:
        WeightFormat("dense" if args.weights == "auto" else args.weights, args.bits or 16, args.group)
    except ValueError as error:
        raise InputError(f"--weights, --group: {error}") from error
    return Wish(args.weights, args.bits, args.group, args.head)


def _write(args: argparse.Namespace, path: Path, wish: Wish) -> list[Row]:
    """Writes OUT, about a layer in memory; returns a row a linear."""
    config, plan = checkpoint.described(path)
    rows: list[Row] = []
    beside: dict[str, bytes] = {}
    carried = checkpoint.carried_files(path)
    with checkpoint.writer(args.out, (path / "config.json").read_bytes(), carried, plan, beside) as leaves:
        for name, leaf, row in _packed(path, config.text, wish):
            leaves.add(name, leaf)
            rows += [row] if row else []
        figures = {"about": machine.facts("lmmjax.pack", args.words), **report.as_json(rows)}
        beside["packing.json"] = (json.dumps(figures, indent=1) + "\n").encode()
    return rows


def _packed(path: Path, text: TextConfig, wish: Wish) -> Iterator[tuple[str, Any | Matrix, Row | None]]:
    """Yields all leaves by name: linears packed, with what that came to, the head if asked, and others as they are."""
    reader, ordered = weights.Reader(path / "params"), orders.read(path)
    others = set(reader.leaves)
    for index in tqdm(range(text.layers), "pack", unit="layer", file=sys.stderr):
        linears = {path_of(index, linear): linear for linear in LINEARS}
        kernels = reader.read(linears)
        for name, linear in linears.items():
            matrix = choice.pack(name, kernels[name], wish, ordered.get(orders.name_of(index, linear)))
            yield name, matrix, report.row(index, linear, kernels[name], matrix)
        others -= set(linears)
    head = choice.EMBEDDING if text.tied else choice.HEAD
    for name in sorted(others):
        leaf = reader.read([name])[name]
        if name == head and wish.head:
            matrix = choice.pack_head(name, leaf, wish.head)
            yield name, matrix, report.row(None, "head", leaf, matrix)
        else:
            yield name, leaf, None


def _on_disk(path: Path) -> str:
    return machine.size(sum(file.stat().st_size for file in (path / "params").rglob("*") if file.is_file()))
