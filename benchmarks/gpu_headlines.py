"""The ratios of the README: a 7B model on a GPU beside its peers, each row from two figures of one machine's files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu_table import LINEAR
from kernels.race.jobs import PEERS
from kernels.race.standings import Standings

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- /gpu -->\n"
DENSE = "bf16"
HEADS = "32x4096 32/32"
STATIC, EAGER, QUANTIZED = (f"transformers, {how}" for how in ("static cache, compiled", "eager", "quantized cache"))
OURS = "ours in bf16"
STEPS = [
    # our case, transformers' case and what it is called, or another case of ours
    (f"1x1024 kv16 {DENSE}", "1x1024 static", STATIC),
    ("1x1024 kv16 int8", f"1x1024 kv16 {DENSE}", OURS),
    ("1x1024 kv16 2:4 int8", f"1x1024 kv16 {DENSE}", OURS),
    ("1x1024 kv16 int4 g128", f"1x1024 kv16 {DENSE}", OURS),
    (f"32x4096 kv16 {DENSE}", "32x4096 dynamic", EAGER),
    (f"32x4096 kv4 {DENSE}", f"32x4096 kv16 {DENSE}", "ours with 16 bits"),
    (f"32x4096 kv4 {DENSE}", "32x4096 quantized", QUANTIZED),
]


def table(folder: Path, device: str) -> str:
    """Returns the table of one device's files, all of which must be there."""
    page = "docs/results.md#on-a-gpu"
    rows = [*_steps(folder, device), *_products(folder, device), *_attention(folder, device)]
    about = _load(folder, f"model-7b-{device}")["about"]
    head = [f"LLaVA-1.5-7B's geometry on an {about['device']}", "", "times as fast as"]
    small = f"{about['date'][:10]}; commands, versions and all figures: [docs/results.md]({page})."
    return f"{tables.table(head, rows)}\n{small}\n"


def shown(readme: str, folder: Path, device: str) -> str:
    """Returns the README with the table in its place."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(folder, device) + END + rest.split(END)[1]


def _steps(folder: Path, device: str) -> Iterator[list[str]]:
    """Yields a decode step of each case beside another one."""
    own, theirs = _load(folder, f"model-7b-{device}")["cases"], _load(folder, f"transformers-7b-{device}")
    for case, other, called in STEPS:
        ms, peer = own[case]["ms"], (own.get(other) or theirs[other])["ms"]
        size, bits, weights = case.split(" ", 2)
        named = f"decode step, {size} tokens, {bits.removeprefix('kv')}-bit cache, {weights} weights"
        yield [named, f"{ms:.2f} ms", f"{peer / ms:.2f}: {called}, {peer:.2f} ms"]


def _products(folder: Path, device: str) -> Iterator[list[str]]:
    """Yields the products of a layer with one row, in each format."""
    rows: list[Any] = [
        row for row in _load(folder, f"weights-{device}")["rows"] if (row["model"], row["m"]) == ("7b", 1)
    ]
    able = [{name for name, one in row["entrants"].items() if "us" in one} for row in rows]
    names = [name for name in rows[0]["entrants"] if name in set.intersection(*able) - {LINEAR, "jax"}]
    whole = {name: sum(row["count"] * row["entrants"][name]["us"] for row in rows) for name in [LINEAR, *names]}
    for name in names:
        ratio = whole[LINEAR] / whole[name]
        yield [f"a layer's products with one row, {name}", f"{whole[name]:.0f} us", f"{ratio:.2f}: {LINEAR}, bf16"]


def _attention(folder: Path, device: str) -> Iterator[list[str]]:
    """Yields attention over 128k tokens with each width, by the fastest backend."""
    standings = Standings.load(folder / f"attend-{device}.json")
    peer = standings.best_peer(HEADS)
    jobs = [job for job in standings.measured() if job["shape"] == HEADS and job["way"] != PEERS and job["speedup"]]
    for bits in sorted({job["bits"] for job in jobs}, reverse=True):
        best = max((job for job in jobs if job["bits"] == bits), key=lambda job: job["speedup"])
        us = best["entrants"][best["way"]]["us"]
        yield [f"attention, 32x4096 tokens, {bits}-bit cache", f"{us:.0f} us", f"{best['speedup']:.2f}: {peer}, bf16"]


def _load(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())
