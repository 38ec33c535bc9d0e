"""What compression costs in quality: python -m benchmarks.quality [--model DIR --text DIR]

Weights at growing sparsity and at 2:4, the KV cache at shrinking widths: every one-shot score, uniform widths and what
the search finds, on easy-VQA's test questions and on plain text. Every figure is written as soon as it is there, and
run again the benchmark goes on where it stopped. python -m benchmarks.results makes the tables.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import machine
from benchmarks.contest import Cell, Contest, Sizes, cells
from lmmjax import checkpoint, perplexity, runtime
from lmmjax.checkpoint import Checkpoint, read_json
from lmmjax.errors import InputError, exit_code
from lmmjax.files import write_atomic
from lmmjax.perplexity import Window
from lmmjax.prompt import Processor


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
        model = checkpoint.load(checkpoint.resolve(args.model))
        contest = Contest(model, Sizes(*_sizes(args)), windows(model, args), args.context, args.batch)
        for cell in tqdm(missing, unit="cell"):
            began = time.monotonic()
            found.append({**contest.measure(cell), "seconds": round(time.monotonic() - began, 1)})
            write_atomic(path, json.dumps({"about": machine.facts(), "settings": settings, "cells": found}, indent=1))
            tqdm.write(_line(found[-1]))
    print(path)
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what all cells of a file have in common."""
    text = {"files": [file.name for file in files(args.text)], "windows": args.windows}
    text |= {"context": args.context, "stride": args.stride}
    return {"model": name_of(args.model), **Sizes(*_sizes(args))._asdict(), "text": text if args.text else None}


def _sizes(args: argparse.Namespace) -> tuple[int, int, int, int]:
    return args.calibration_samples, args.search_samples, args.samples, args.trials


def found_in(path: Path, settings: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns the figures that an earlier run of the same settings has left."""
    if not path.exists():
        return []
    known = read_json(path)
    if known["settings"] != settings:
        raise InputError(f"{path} holds figures of other settings ({known['settings']}): give another --name, or them")
    return known[key]


def files(given: Sequence[Path]) -> list[Path]:
    """Returns the files, those of a directory in order of their names."""
    return [file for path in given for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]


def windows(model: Checkpoint, args: argparse.Namespace) -> list[Window]:
    """Returns windows spread evenly over all of the text's."""
    if not args.text:
        return []
    documents = perplexity.read(Processor.load(model.path, model.config), files(args.text))
    found = perplexity.windows(documents, args.context, args.stride)
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, args.windows).round().astype(int))]


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def name_of(model: str | None) -> str:
    """Returns what a model's results are filed under."""
    return Path(model).resolve().name if model else checkpoint.EMBEDDED.name


def _line(row: dict[str, Any]) -> str:
    loss = f"KL {row['kl']:.4f}" if row["kl"] is not None else "KL inf"
    text = f"  perplexity {row['ppl']:.2f}" if row.get("ppl") else ""
    cell = f"{row['axis']:<8}{row['level']:>4} {row['method']:<11} seed {row['seed']}"
    return f"{cell}  {100 * row['right']:5.1f}% right  {loss}{text}  {row['seconds']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model)")
    add(
        "--text", type=Path, nargs="+", default=[], metavar="FILE|DIR", help="plain text for perplexity: *.txt of a DIR"
    )
    add("--sparsity", nargs="+", default=["0.5", "0.6", "0.7", "0.4", "2:4"], metavar="S|N:M")
    add("--bits", type=int, nargs="+", default=[4, 3, 2, 6, 8], metavar="B", help="of keys and values, 2 to 8")
    add("--seeds", type=int, default=3, help="of calibration and search (default: %(default)s)")
    add("--samples", type=int, default=160, help="questions judged by (default: %(default)s)")
    add("--windows", type=int, default=8, help="windows of text judged by (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens a window (default: %(default)s)")
    add("--stride", type=int, default=512, help="tokens from one window to the next (default: %(default)s)")
    add("--trials", type=int, default=28, help="of a search (default: %(default)s)")
    add("--calibration-samples", type=int, default=64, help="default: %(default)s")
    add("--search-samples", type=int, default=32, help="questions that a trial is judged by (default: %(default)s)")
    add("--batch", type=int, default=16)
    add("--name", metavar="NAME", help="the file is benchmarks/results/quality-NAME.json (default: the model's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
