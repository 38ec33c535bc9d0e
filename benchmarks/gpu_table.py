"""The tables of what was measured on GPUs: attention, products with packed weights, and whole models' decode steps."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import tables
from kernels.race.jobs import PEERS
from kernels.race.standings import Standings

LEGEND = """Measured by the commands of `python -m benchmarks.gpu`; what was tried, and what came of it, is in
[gpu-notes.md](../benchmarks/results/gpu-notes.md). *Of a copy*: bytes that must be read, a second, over those that a
copy on the same device reads and writes.
"""
LINEAR = "torch linear"


def page(folder: Path) -> str:
    """Returns all tables of a folder's files; nothing where there are none."""
    parts = [
        *(attention(path) for path in sorted(folder.glob("attend-*.json"))),
        *(products(path) for path in sorted(folder.glob("weights-nvidia*.json"))),
        *(steps(path) for path in sorted([*folder.glob("model-*.json"), *folder.glob("transformers-*.json")])),
    ]
    return "\n".join([f"## On a GPU\n\n{LEGEND}", *parts]) if parts else ""


def attention(path: Path) -> str:
    """Returns the table of a file of `kernels.bench`: a row a shape, width and backend."""
    standings = Standings.load(path)
    lines = [_attended(job) for job in standings.measured()]
    head = ["decode attention", "bits", "", "us", "of a copy", "error", "of the fastest bfloat16 attention"]
    best = ", ".join(_fastest(standings))
    return f"{tables.table(head, lines)}\n{best}. {_small_print(standings.latest_run, path)}"


def products(path: Path) -> str:
    """Returns the table of a file of `benchmarks.weights_gpu`: microseconds a product, and a layer beside torch's."""
    found = json.loads(path.read_text())
    rows = found["rows"]
    sides = dict.fromkeys(side for row in rows for side in row["entrants"])
    layer = {side: sum(row["count"] * row["entrants"][side].get("us", float("nan")) for row in rows) for side in sides}
    head = ["us a product (of a copy)", *(f"{row['model']} {row['linear']}, {_rows(row['m'])}" for row in rows)]
    lines = [
        [side, *(_product(row["entrants"][side]) for row in rows), f"{layer[LINEAR] / layer[side]:.2f}x"]
        for side in sides
    ]
    return f"{tables.table([*head, 'all seven linears'], lines)}\n{_small_print(found['about'], path)}"


def steps(path: Path) -> str:
    """Returns the table of a file of `benchmarks.gpu_model` or `gpu_peers_torch`: milliseconds a decode step."""
    found = json.loads(path.read_text())
    cases = found.get("cases") or {name: one for name, one in found.items() if isinstance(one, dict) and "ms" in one}
    who = "transformers" if "cases" not in found else "lmmjax"
    of = f"{found['model']}, {found['layers']} layers" if "layers" in found else found["model"]
    lines = [
        [name, f"{one['ms']:.2f}", f"{one['of_floor']:.2f}" if "of_floor" in one else ""]
        for name, one in cases.items()
        if "ms" in one
    ]
    head = [f"{who}, {of}: rows x context, cache, weights", "ms a step", "of a copy"]
    return f"{tables.table(head, lines)}\n{_small_print(found['about'], path)}"


def _attended(job: Mapping[str, Any]) -> list[str]:
    own = job["entrants"][job["way"]]
    scheme = f", {job['scheme']}" if job["scheme"] else ""
    ratio = f"{job['speedup']:.2f}x" if job["speedup"] else ""
    return [
        f"{job['shape']}{scheme}",
        str(job["bits"]),
        job["way"],
        f"{own['us']:.0f}",
        f"{own['of_copy']:.2f}",
        f"{own['error']:.1e}",
        ratio,
    ]


def _fastest(standings: Standings) -> Iterator[str]:
    """Yields the fastest peer of each shape."""
    for job in standings.jobs.values():
        if job["way"] == PEERS and (name := standings.best_peer(job["shape"])):
            yield f"{job['shape']}: {name}, {job['entrants'][name]['us']:.0f} us"


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _product(one: Mapping[str, Any]) -> str:
    return f"{one['us']:.1f} ({one['of_copy']:.2f})" if "us" in one else "-"


def _small_print(about: Mapping[str, Any], path: Path) -> str:
    parts = [
        about["device"],
        tables.versions(about),
        about["date"][:10],
        f"`{about['command']}`",
        tables.source(path.name),
    ]
    return f"{'; '.join(parts)}.\n"
