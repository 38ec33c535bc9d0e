"""The standings as text: a table a way and scheme, and a line a floor that says whether it was reached."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kernels.race.entrants import DEQUANTIZE
from kernels.race.jobs import PEERS
from kernels.race.standings import Standings

Measured = Mapping[str, Any]
"""A job of the standings with a time of ours."""


class Floor(NamedTuple):
    """What is asked of a width: a share of the copy's bandwidth, and how many times the best bfloat16 peer."""

    bits: int
    share: float
    speedup: float | None


FLOORS = (Floor(16, 0.85, None), Floor(8, 0.80, 1.6), Floor(4, 0.70, 2.6), Floor(2, 0.50, 3.3))
ERROR = 2e-3


def tables(standings: Standings, widths: Sequence[int]) -> str:
    """Returns all tables: rows are shapes, columns widths."""
    measured = standings.measured()
    ways = dict.fromkeys(job["way"] for job in measured)
    pairs = [(way, scheme) for way in ways for scheme in _schemes([job for job in measured if job["way"] == way])]
    return "\n\n".join(_table(standings, way, scheme, widths) for way, scheme in pairs)


def floors(standings: Standings, large: int) -> list[str]:
    """Returns a line a scheme and floor, for all shapes with at least `large` cached tokens; and one for the errors."""
    ours = [job for job in standings.measured() if job["way"] != DEQUANTIZE and job["cached"] >= large]
    lines = [
        f"{scheme or 'exact'}: {_floor(floor, [job for job in ours if job['scheme'] in (scheme, None)], large)}"
        for scheme in _schemes(ours)
        for floor in FLOORS
    ]
    if ours:
        worst = max((_own(job) for job in ours), key=lambda one: one["error"])
        reached = f"reached {worst['error']:.1e} (rounding to bf16 alone is {worst['error_of_rounding']:.1e})"
        lines.append(f"relative error <= {ERROR:g}: {reached}: {_verdict(worst['error'] <= ERROR)}")
    return lines


def _schemes(jobs: Sequence[Measured]) -> list[str | None]:
    """Returns the schemes of jobs in their order; exact caches belong to each, and stand alone where there is none."""
    found = dict.fromkeys(job["scheme"] for job in jobs)
    return [scheme for scheme in found if scheme] or list(found)


def _table(standings: Standings, way: str, scheme: str | None, widths: Sequence[int]) -> str:
    own = {
        (job["shape"], job["bits"]): job
        for job in standings.measured()
        if job["way"] == way and job["scheme"] in (scheme, None)
    }
    shapes = dict.fromkeys(shape for shape, _ in own)
    rows = [[shape, *(_cell(own.get((shape, bits))) for bits in widths), _peer(standings, shape)] for shape in shapes]
    head = ["batch x context, heads", *(f"{bits} bits" for bits in widths), "best bf16 peer"]
    title = f"{way}, {scheme or 'exact'}: us, share of the copy's bandwidth, times as fast as the peer"
    return f"{title}\n{_aligned([head, *rows])}"


def _floor(floor: Floor, jobs: Sequence[Measured], large: int) -> str:
    """Returns a floor's line: of each shape the fastest way, of these the worst figures."""
    tokens = f"{large // 1024}k" if large >= 1024 else f"{large}"
    times_asked = f" and >= {floor.speedup:.1f}x best bf16 peer" if floor.speedup else ""
    name = "bf16" if floor.bits == 16 else f"int{floor.bits}"
    asked = f"{name} >= {_share(floor.share)} of copy bandwidth{times_asked} at B*S >= {tokens}"
    best: dict[str, Measured] = {}
    for job in sorted((job for job in jobs if job["bits"] == floor.bits), key=lambda job: _own(job)["us"]):
        best.setdefault(job["shape"], job)
    if not best:
        return f"{asked}: not measured"
    share, times = min(_own(job)["of_copy"] for job in best.values()), [job["speedup"] for job in best.values()]
    slowest = None if None in times else min(times)
    met = share >= floor.share and (floor.speedup is None or (slowest is not None and slowest >= floor.speedup))
    return f"{asked}: reached {_share(share)}, {_times(slowest)} (the worst of {len(best)} shapes): {_verdict(met)}"


def _own(job: Measured) -> Mapping[str, Any]:
    return job["entrants"][job["way"]]


def _cell(job: Measured | None) -> str:
    return "-" if job is None else f"{_own(job)['us']:.4g} {_share(_own(job)['of_copy'])} {_times(job['speedup'])}"


def _peer(standings: Standings, shape: str) -> str:
    name = standings.best_peer(shape)
    if name is None:
        return "-"
    best = standings.jobs[f"{shape} {PEERS}"]["entrants"][name]
    return f"{name} {best['us']:.4g} {_share(best['of_copy'])}"


def _times(speedup: float | None) -> str:
    return "no peer" if speedup is None else f"{speedup:.2f}x"


def _share(x: float) -> str:
    return f"{x:.2f}".removeprefix("0")


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
