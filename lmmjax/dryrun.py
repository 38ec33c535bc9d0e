"""What a run would take in memory, printed before anything is loaded: lmmjax.generate --dry-run."""

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmmjax import answer, engine
from lmmjax.checkpoint import describe
from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError
from lmmjax.machine import size
from lmmjax.memory import LayerMemory, MemoryReport, SideMemory, memory_report
from lmmjax.plan import Plan
from lmmjax.prompt import bucket

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
NOTES = (
    "counted in full: pruned weights that are not packed (lmmjax.pack), for they are kept as zeros",
    "not counted: activations, XLA's temporaries, compiled programs, libraries, calibration by a pruning plan",
)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be reported: the memory there is in bytes, the cache's rows, and the tokens in each; None if unsaid.

    `prompt` is a question's ids; they and the `max_tokens` of its answer then are a row's tokens.
    """

    memory: int | None
    batch: int
    context: int | None
    max_tokens: int
    prompt: Sequence[int] | None = None


def wish(args: argparse.Namespace) -> Wish:
    """Returns what the flags ask for; raises InputError for what cannot be used, before anything is read."""
    for flag, got in (("--memory", args.memory), ("--batch", args.batch), ("--context", args.context)):
        if got is not None and not args.dry_run:
            raise InputError(f"{flag}: got {got} without --dry-run, which alone uses it; give both")
    if args.context is not None and has_question(args):
        raise InputError(
            f"--context: got {args.context} beside a prompt or an image, which say how much they need; give one of them"
        )
    return Wish(
        memory=None if args.memory is None else parse_size("--memory", args.memory),
        batch=1 if args.batch is None else parse_count("--batch", args.batch, 2**31 - 1),
        context=None if args.context is None else parse_count("--context", args.context, 2**31 - 1),
        max_tokens=args.max_tokens,
    )


def has_question(args: argparse.Namespace) -> bool:
    return args.prompt is not None or bool(args.image)


def run(asked: Wish, path: Path, plan: Plan | None, as_json: bool) -> int:
    """Returns 1 if the weights and the cache do not fit in the memory, else 0, after printing what they take."""
    model = answer.outline(path, plan)
    row = _row(asked, model.config, model.plan)
    report = memory_report(model.config, model.plan, asked.batch, params=model.params, **row._asdict())
    fits = None if asked.memory is None else report.total <= asked.memory
    stored = describe(path)["dtypes"]
    if as_json:
        print(json.dumps({**report.to_dict(), "stored_dtypes": stored, "memory": asked.memory, "fits": fits}))
    else:
        print(page(report, asked.memory, stored))
    return 1 if fits is False else 0


def page(report: MemoryReport, memory: int | None = None, stored: Sequence[str] = ()) -> str:
    """Returns the report for people to read: a line a part, like layers folded, and what follows from it.

    `stored` are the dtypes of the weights on disk, of which a device may hold others.
    """
    parts = {name: [name, size(nbytes)] for name, nbytes in report.parts.items()}
    first = [parts.pop(name) for name in ("vision", "projector", "text.embedding") if name in parts]
    layers = [_layers(number, run, report.images > 0) for number, run in _folded(report.layers)]
    widths = "K, V (text/image)" if report.images else "K, V bits"
    header = ["", "weights", widths, "codes", "scales", "exact", "KV"]
    total = ["all", size(report.weights), "", *_sizes(report.kv)]
    table = _aligned([header, *first, *layers, *parts.values(), total])
    return "\n".join([*table, "", *_facts(report, stored), *_verdict(report, memory), *NOTES])


def parse_size(flag: str, text: str) -> int:
    """Returns the bytes that a text such as 8GiB, 1.5 GB or 500MB stands for."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?i?b)", text.strip(), re.IGNORECASE | re.ASCII)
    nbytes = int(float(found[1]) * UNITS[found[2].upper()]) if found and found[2].upper() in UNITS else 0
    if nbytes < 1:
        raise InputError(f"{flag}: got {text!r}, expected a number with a unit, such as 8GiB, 12GB or 500MB")
    return nbytes


def parse_count(flag: str, text: str, most: int) -> int:
    """Returns a whole number from 1 to `most`."""
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not 1 <= int(text) <= most:
        raise InputError(f"{flag}: got {text}, expected a whole number from 1 to {most}")
    return int(text)


class _Row(NamedTuple):
    """Tokens of one row: asked for, what the engine makes room for, and the image tokens among them."""

    context: int
    capacity: int
    images: int


def _row(asked: Wish, config: LlavaConfig, plan: Plan | None) -> _Row:
    """Returns how large the engine makes a row.

    Where nothing is said about images, a row that has room for one holds one.
    """
    limit, image = config.text.context, config.image_tokens
    if asked.prompt is not None:
        length, images = len(asked.prompt), asked.prompt.count(config.image_token)
        room = engine.room(config, plan, bucket(length), [images], asked.max_tokens)
        return _Row(min(length + asked.max_tokens, limit), *room)
    if asked.context is not None and asked.context > limit:
        raise InputError(f"--context: got {asked.context}, expected at most the model's context of {limit}")
    context = asked.context or limit
    return _Row(context, *engine.room(config, plan, context, [image if image < context else 0], 0))


def _folded(layers: Sequence[LayerMemory]) -> list[tuple[int, list[LayerMemory]]]:
    """Returns runs of layers that take the same, each behind its first layer's number."""
    runs = [list(run) for _, run in itertools.groupby(layers)]
    starts = itertools.accumulate((len(run) for run in runs), initial=0)
    return list(zip(starts, runs, strict=False))


def _layers(first: int, run: Sequence[LayerMemory], apart: bool) -> list[str]:
    one, last = run[0], first + len(run) - 1
    name = f"layer {first}" if len(run) == 1 else f"layers {first}-{last}, each"
    widths = [f"{text}/{image}" if apart else f"{text}" for text, image in (one.key_bits, one.value_bits)]
    return [name, size(one.weights), ", ".join(widths), *_sizes(one.kv)]


def _sizes(kv: SideMemory) -> list[str]:
    return [size(nbytes) for nbytes in (kv.codes, kv.scales, kv.exact, kv.total)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows as lines, the first column flush left and the others flush right."""
    full = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = [
        "  ".join([name.ljust(first), *[cell.rjust(width) for cell, width in zip(cells, others, strict=True)]])
        for name, *cells in full
    ]
    return [line.rstrip() for line in lines]


def _facts(report: MemoryReport, stored: Sequence[str]) -> list[str]:
    held = ", ".join(report.weights_dtypes)
    if set(stored) - set(report.weights_dtypes):
        held += f" on this device (stored: {', '.join(stored)})"
    images = f", {report.images} of them of images" if report.images else ""
    return [
        f"weights  {held}; a decode step reads {size(report.step_weights)} of them",
        f"cache    {report.batch} x {report.capacity} tokens (asked: {report.context}{images}),"
        f" {report.bits_per_element:.2f} bits a number, all counted; exact tokens in {report.exact_dtype}",
        f"KV       {_matters(report, dense=False)}",
        f"dense    {_matters(report, dense=True)}",
    ]


def _matters(report: MemoryReport, dense: bool) -> str:
    kv = report.kv_dense if dense else report.kv.total
    tenth, half = (report.tokens_where_kv_is(share, dense) for share in (10, 2))
    share = kv / (report.weights + kv)
    return f"{size(kv)}, {share:.1%} of all; 10% from batch x context = {tenth:,} tokens on, half from {half:,}"


def _verdict(report: MemoryReport, memory: int | None) -> list[str]:
    sides = f"{size(report.weights)} of weights + {size(report.kv.total)} of KV"
    lines = [f"total    {sides} = {size(report.total)} ({report.total:,} bytes)"]
    if memory is None:
        return lines
    left = memory - report.total
    said = f"fits, {size(left)} left" if left >= 0 else f"DOES NOT FIT, {size(-left)} too little"
    return [*lines, f"memory   {size(memory)} ({memory:,} bytes): {said}"]
