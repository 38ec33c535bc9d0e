"""What compression costs in quality: python -m benchmarks.quality [--model DIR --text DIR]

Weights at growing sparsity and at 2:4, the KV cache at shrinking widths: every one-shot score, uniform widths and what
the search finds, on easy-VQA's test questions and on plain text. Every figure is written as soon as it is there, and
run again the benchmark goes on where it stopped. python -m benchmarks.results makes the tables.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import judged, machine
from benchmarks.contest import Cell, Contest, Sizes, cells
from benchmarks.judged import found_in, name_of, windows
from lmmjax import runtime
from lmmjax.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures the cells that are missing in benchmarks/results/quality-NAME.json; returns 0."""
    runtime.prepare()
    path = machine.RESULTS / f"quality-{args.name or name_of(args.model)}.json"
    settings = _settings(args)
    found = found_in(path, settings, "cells")
    done = {_cell(row) for row in found}
    missing = [cell for cell in cells(args.sparsity, args.bits, args.seeds) if cell not in done]
    if missing:
        model = judged.dense(args)
        contest = Contest(model, Sizes(*_sizes(args)), windows(model, args), args.context, args.batch)
        judged.measure(path, settings, "cells", found, missing, contest.measure, _line)
    print(path)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what all cells of a file have in common."""
    return {"model": name_of(args.model), **Sizes(*_sizes(args))._asdict(), "text": judged.text(args)}


def _sizes(args: argparse.Namespace) -> tuple[int, int, int, int]:
    return args.calibration_samples, args.search_samples, args.samples, args.trials


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def _line(row: dict[str, Any]) -> str:
    loss = f"KL {row['kl']:.4f}" if row["kl"] is not None else "KL inf"
    text = f"  perplexity {row['ppl']:.2f}" if row.get("ppl") else ""
    cell = f"{row['axis']:<8}{row['level']:>4} {row['method']:<11} seed {row['seed']}"
    return f"{cell}  {100 * row['right']:5.1f}% right  {loss}{text}  {row['seconds']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    judged.add(parser, samples=160, windows=8)
    add("--sparsity", nargs="+", default=["0.5", "0.6", "0.7", "0.4", "2:4"], metavar="S|N:M")
    add("--bits", type=int, nargs="+", default=[4, 3, 2, 6, 8], metavar="B", help="of keys and values, 2 to 8")
    add("--seeds", type=int, default=3, help="of calibration and search (default: %(default)s)")
    add("--trials", type=int, default=28, help="of a search (default: %(default)s)")
    add("--calibration-samples", type=int, default=64, help="default: %(default)s")
    add("--search-samples", type=int, default=32, help="questions that a trial is judged by (default: %(default)s)")
    add("--name", metavar="NAME", help="the file is benchmarks/results/quality-NAME.json (default: the model's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
