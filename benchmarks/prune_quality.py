"""What every way to prune costs in quality: python -m benchmarks.prune_quality [--model DIR --text DIR ...]

Every score alone, with SparseGPT's and with ADMM's update, and every allocation, at the same exact sparsities and in
patterns: easy-VQA's test questions and perplexity. Statistics are the dense model's, one-shot, so that all methods of
a seed rest on the same. Every figure is written as soon as it is there; run again, it goes on where it stopped.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import judged, machine
from benchmarks.judged import files, found_in, name_of, windows
from benchmarks.kv_judge import Judge
from benchmarks.prune_cells import Cell, cells
from lmmjax import calibrate, data, runtime
from lmmjax.calibrate import gradients, samples, walk
from lmmjax.calibrate.loss import Loss
from lmmjax.calibrate.samples import Recipe
from lmmjax.calibrate.statistics import LayerStatistics
from lmmjax.checkpoint import Checkpoint
from lmmjax.config import LINEARS
from lmmjax.data import EASY_VQA, Encoded
from lmmjax.errors import exit_code
from lmmjax.layered import held
from lmmjax.linears import kernels_of, named
from lmmjax.llava import Params
from lmmjax.prompt import Processor
from lmmjax.prune.allocations import Evidence, allocate

LEVELS = ("0.5", "0.6", "2:4", "0.7", "0.4", "4:8")
LOSS_SAMPLES = 16
"""Questions that ECoFLaP's losses are taken on: two a layer, through all layers behind it."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures the cells that are missing in benchmarks/results/prune-quality-NAME.json; returns 0."""
    runtime.prepare()
    path = machine.RESULTS / f"prune-quality-{args.name or name_of(args.model)}.json"
    settings = rests_on(args)
    found = found_in(path, settings, "cells")
    done = {Cell.of(row) for row in found}
    missing = [cell for cell in cells(args.levels, args.seeds) if cell not in done]
    if missing:
        contest = Contest(judged.dense(args), args)
        judged.measure(path, settings, "cells", found, missing, contest.row, _line)
    print(path)
    return 0


class Contest:
    """All that cells have in common: the model, what it is judged by, and a seed's statistics."""

    def __init__(self, model: Checkpoint, args: argparse.Namespace):
        self._model, self._args = model, args
        self._processor = Processor.load(model.path, model.config)
        (questions,) = data.disjoint(data.load(EASY_VQA, "test"), [args.samples], 0)
        self._judge = Judge(model, data.encode(self._processor, questions), windows(model, args), args.batch)
        # The latest seed's only: all layers' Gram matrices and gradients.
        self._statistics = functools.lru_cache(1)(self._calibrate)

    def row(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's figures, under its names."""
        return {**cell._asdict(), **self.measure(cell)}

    def measure(self, cell: Cell, layers: Container[int] | None = None) -> dict[str, Any]:
        """Returns a cell's quality, and the seconds that pruning took; of these layers alone, or of all."""
        if not cell.level:
            return self._judge.weights(self._model.params)
        drops, stats = self.drops(cell), self._statistics(cell.seed)
        began = time.monotonic()
        text = dict(self._model.params["text"])
        for index, (statistics, row) in enumerate(zip(stats, drops, strict=True)):
            if layers is not None and index not in layers:
                continue
            name = f"layers_{index}"
            text[name], _ = cell.method.layer(text[name], statistics, row, f"layer {index}")
        params = jax.block_until_ready(self._model.params | {"text": text})
        seconds = round(time.monotonic() - began, 1)
        return {
            "sparsity": _sparsity(self._model.config.text.layers, params),
            "prune": seconds,
            **self._judge.weights(params),
        }

    def _calibrate(self, seed: int) -> tuple[LayerStatistics, ...]:
        model, sets = self._model, self._samples(seed)
        stats = calibrate.statistics(model.config, model.params, sets, grams=True)
        whole = held(model.config, model.params)
        rows = walk.embedded(model.config, whole.outer, sets)
        with tempfile.TemporaryDirectory() as folder:
            slopes = dict(gradients.sizes(whole, rows, Path(folder)))
        return tuple(one.with_gradients(slopes[i]) for i, one in enumerate(stats))

    def _samples(self, seed: int) -> list[Encoded]:
        args = self._args
        text = tuple(files(args.calibration))
        recipe = Recipe(EASY_VQA, args.calibration_samples, text, args.calibration_windows, args.length, seed)
        return samples.encode(self._processor, recipe)

    def drops(self, cell: Cell) -> list[dict[str, int]]:
        """Returns how many inputs of each linear go, layer by layer; a pattern says itself."""
        text = self._model.config.text
        if ":" in cell.level:
            return [dict.fromkeys(LINEARS, 0)] * text.layers
        whole = held(self._model.config, self._model.params)
        loss = Loss(whole, self._few(cell.seed)) if cell.allocation == "ecoflap" else None
        evidence = Evidence(text, float(cell.level), whole.layer, self._statistics(cell.seed), loss, cell.seed)
        return [named(row) for row in allocate(cell.allocation, evidence)]

    def _few(self, seed: int):
        (questions,) = data.disjoint(data.load(EASY_VQA, "train"), [LOSS_SAMPLES], seed)
        encoded = data.encode(self._processor, questions)
        return walk.embedded(self._model.config, self._model.params, encoded)


def _sparsity(layers: int, params: Params) -> float:
    """Returns the share of zeros among the prunable weights."""
    kernels = [kernel for i in range(layers) for kernel in kernels_of(params["text"][f"layers_{i}"]).values()]
    return 1 - sum(int((kernel != 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)


def rests_on(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what all figures of a file have in common."""
    names = ("samples", "calibration_samples", "calibration_windows", "length")
    calibration = [file.name for file in files(args.calibration)]
    sizes = {name: getattr(args, name) for name in names}
    return {"model": name_of(args.model), **sizes, "text": judged.text(args), "calibration": calibration}


def _line(row: dict[str, Any]) -> str:
    order = "permuted" if row["permute"] else ""
    name = " ".join(filter(None, (row["score"] or "dense", order, row["update"], row["allocation"])))
    text = f"  perplexity {row['ppl']:.2f}" if "ppl" in row else ""
    return f"{row['level']:>4} {name:<36} seed {row['seed']}  {100 * row['right']:5.1f}%{text}  {row['seconds']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prune_quality", description=(__doc__ or "").split("\n")[0]
    )
    add(parser, samples=96)
    more = parser.add_argument
    more("--levels", nargs="+", default=LEVELS, metavar="S|N:M")
    more("--seeds", type=int, default=3, help="of calibration (default: %(default)s)")
    more("--name", metavar="NAME", help="the file is benchmarks/results/prune-quality-NAME.json (default: the model's)")
    return parser


def add(parser: argparse.ArgumentParser, samples: int) -> None:
    """Adds the flags that say by what a model is judged and what methods are calibrated on."""
    judged.add(parser, samples=samples, windows=6)
    add = parser.add_argument
    add("--calibration", type=Path, nargs="+", default=[], metavar="FILE|DIR", help="text to calibrate on, too")
    add("--calibration-samples", type=int, default=64, help="questions (default: %(default)s)")
    add("--calibration-windows", type=int, default=8, help="windows of text (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens of such a window (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
