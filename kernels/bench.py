"""Time decode attention over quantized caches beside its peers: python -m kernels.bench [--smoke].

Each of our backends runs by turns with the fastest bfloat16 peer of its shape: JAX's own, and torch's where they load.
Data are random and all rows full. Every figure is on disk before the next is taken, the most telling first.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels import attend
from kernels.race import contest, entrants, timing
from kernels.race.caches import Shape
from kernels.race.contest import Contest, Peers, say
from kernels.race.jobs import FULL, SCHEMES, SMOKE, WIDTHS, Job, Size, schedule
from kernels.race.standings import Standings
from kernels.race.tables import floors, tables

TORCH = "benchmarks.attend_peers_torch"


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(arguments)
    # Else JAX takes most of the memory at once, and leaves torch too little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    size = SMOKE if args.smoke else FULL
    try:
        if args.show:
            _print(Standings.load(Path(args.out)), args.bits, size)
            return 0
        jobs, modules = _jobs(size, args), _peers(args.peers)
        standings = Standings.open(Path(args.out), args.resume)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        standings.begin(arguments, timing.copy_bandwidth(size.copied, size.rounds, size.seconds))
        say(f"{jax.devices()[0].device_kind}: copies {standings.copy / 1e9:.0f} GB/s, read and written")
        contest.run(jobs, Contest(size, modules, standings), standings, began + 60 * args.minutes)
    except KeyboardInterrupt:
        say(f"interrupted; {args.out} has what was measured")
        return 130
    _print(standings, args.bits, size)
    say(f"written: {args.out}")
    return 0


def _print(standings: Standings, bits: Sequence[int], size: Size) -> None:
    print(tables(standings, sorted(bits, reverse=True)))
    print("\n".join(["", *floors(standings, size.large)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description="Time decode attention over quantized caches beside its peers."
    )
    ways = [*attend.BACKENDS, entrants.DEQUANTIZE]
    parser.add_argument("--out", default="runs/bench/attend.json", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with that file; what failed is tried again")
    parser.add_argument("--show", action="store_true", help="print that file's tables, wherever measured, and end")
    parser.add_argument("--minutes", type=float, default=9, help="after which nothing more begins; default: 9")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs; for CPUs")
    parser.add_argument(
        "--peers", metavar="MODULE", help=f"of peers beside JAX's, or none; default: {TORCH}, if it loads"
    )
    parser.add_argument("--backends", nargs="+", choices=ways, help="default: all that can")
    parser.add_argument("--rows", nargs="+", metavar="BxS", help="batch and context; default: all")
    parser.add_argument("--heads", nargs="+", metavar="H/K", help="heads and kv heads; default: all")
    parser.add_argument("--bits", nargs="+", type=int, choices=WIDTHS, default=WIDTHS, help="default: all")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help="default: all")
    return parser


def _jobs(size: Size, args: argparse.Namespace) -> list[Job]:
    rows = _named("--rows", args.rows, {f"{b}x{s}": (b, s) for b, s in size.rows})
    heads = _named("--heads", args.heads, {f"{h}/{k}": (h, k) for h, k in size.heads})
    shapes = [Shape(b, s, h, k, size.head_dim) for h, k in heads for b, s in rows]
    return schedule(shapes, size.large, args.bits, [SCHEMES[name] for name in args.schemes], args.backends)


def _named(flag: str, names: Sequence[str] | None, known: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(f"{flag}: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    return [pair for name, pair in known.items() if names is None or name in names]


def _peers(module: str | None) -> list[Peers]:
    """Returns the modules of peers: JAX's, and torch's unless there is none. One that was asked for must load."""
    ours: Any = entrants
    if module == "none":
        return [ours]
    try:
        others: Any = importlib.import_module(module or TORCH)
    except ImportError as error:
        if module is not None:
            raise ValueError(f"--peers: {module} does not load ({error})") from error
        say(f"without torch's attention: {TORCH} does not load ({error})")
        return [ours]
    return [ours, others]


if __name__ == "__main__":
    sys.exit(main())
