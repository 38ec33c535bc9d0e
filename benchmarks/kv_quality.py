"""What a quantized KV cache costs in quality: python -m benchmarks.kv_quality --model runs/smol --text DIR

KIVI's scheme, plain rounding by token, ours, every option by itself, and Hugging Face's quantized cache by its own
code, at 4, 3 and 2 bits: KL to the dense model, easy-VQA's test questions, perplexity, and true bits a value with all
metadata. Every figure is written as soon as it is there; run again, the benchmark goes on where it stopped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import judged, kv_peers, machine
from benchmarks.judged import found_in, name_of, windows
from benchmarks.kv_judge import Judge, Widths, sizes
from benchmarks.kv_rows import Row, rows
from benchmarks.kv_table import page
from lmmjax import data, kv_error, perplexity, runtime
from lmmjax.checkpoint import Checkpoint
from lmmjax.errors import exit_code
from lmmjax.likelihood import gather
from lmmjax.perplexity import Window
from lmmjax.plan import CacheFormat
from lmmjax.prompt import Processor
from search import sets, warm
from search.cache_budget import CacheBudget
from search.knapsack import knapsack

PEERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("transformers + quanto", {"bits": 4, "group": 64}),
    ("transformers + quanto", {"bits": 2, "group": 64}),
    ("transformers + quanto, KIVI's axes", {"bits": 4, "group": 32, "key_axis": -1}),
    ("transformers + quanto, KIVI's axes", {"bits": 2, "group": 32, "key_axis": -1}),
)
"""Settings of benchmarks.kv_peers_torch.Quanto; the first two are transformers' defaults.

KIVI's axes are judged by text alone, its windows filled up to whole groups: quanto refuses keys by channel where
groups do not fill the tokens.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures what is missing in benchmarks/results/kv-quality-NAME.json and prints all; returns 0."""
    runtime.prepare()
    path = machine.RESULTS / f"kv-quality-{name_of(args.model)}.json"
    settings = _settings(args)
    found = found_in(path, settings, "rows")
    done = {(row["method"], row["level"]) for row in found}
    model = judged.dense(args)
    bench = Bench(model, args)
    wanted = [(row.method, _level(row)) for row in rows(model.config.text)]
    wanted += [(name, str(settings["bits"])) for name, settings in PEERS if not args.no_peers]
    chosen = [("dense", ""), *(one for one in wanted if not args.methods or one[0] in args.methods)]
    missing = [one for one in chosen if one not in done]
    judged.measure(path, settings, "rows", found, missing, bench.row, _line)
    print(page(json.loads(path.read_text())))
    return 0


class Bench:
    """All that is computed once: questions, windows, the dense predictions and the sensitivities."""

    def __init__(self, model: Checkpoint, args: argparse.Namespace):
        self._model, self._args = model, args
        taken = sets.take(data.EASY_VQA, args.calibration_samples, 1, args.samples, seed=0)
        processor = Processor.load(model.path, model.config)
        self._questions = data.encode(processor, taken.report)
        self._calibrating = data.encode(processor, taken.calibration)
        self._windows: list[Window] = windows(model, args)
        self._judge: Judge | None = None
        self._torch: Any = None
        self._sensitivity: kv_error.Sensitivity | None = None

    def row(self, one: tuple[str, str]) -> dict[str, Any]:
        """Returns the figures of a method at a level, under their names."""
        method, level = one
        return {"method": method, "level": level, **self.measure(method, level)}

    def measure(self, method: str, level: str) -> dict[str, Any]:
        """Returns the figures of one row."""
        if method.startswith("transformers"):
            return self._peer(method, int(level))
        if self._judge is None:
            self._judge = Judge(self._model, self._questions, self._windows, self._args.batch)
        if method == "dense":
            return self._judge(None, None)
        row = next(row for row in rows(self._model.config.text) if (row.method, _level(row)) == (method, level))
        widths = self._widths(row)
        true = {str(tokens): sizes(self._model, row.form, widths, tokens) for tokens in self._args.contexts}
        chosen = {"key_bits": widths.keys.tolist(), "value_bits": widths.values.tolist()} if row.budget else {}
        return {**self._judge(row.form, widths), "form": dataclasses.asdict(row.form), "true_bits": true, **chosen}

    def _widths(self, row: Row) -> Widths:
        layers = self._model.config.text.layers
        alike = np.full(layers, row.bits)
        if row.budget is not None:
            return self._by_sensitivity(row.form, row.budget)
        if row.visual_bits is None:
            return Widths(alike, alike)
        return Widths(alike, alike, np.full(layers, row.visual_bits), np.full(layers, row.visual_bits))

    def _by_sensitivity(self, form: CacheFormat, bits: float) -> Widths:
        """Returns the widths whose errors of attention sum up to least, all bytes within the budget."""
        if self._sensitivity is None:
            model = self._model
            self._sensitivity = kv_error.gather(
                list(kv_error.sums(model.config, model.params, self._calibrating, form))
            )
        measured = warm.Measured(*(np.square(self._sensitivity.error[side]) for side in kv_error.SIDES))
        budget = CacheBudget(self._model.config.text, bits / 16, self._args.contexts[0], form)
        chosen = knapsack(warm.pairs(measured, budget), int(budget.keep * budget.dense_bytes))
        return Widths(np.array([pair.key_bits for pair in chosen]), np.array([pair.value_bits for pair in chosen]))

    def _peer(self, method: str, bits: int) -> dict[str, Any]:
        """Returns the figures of Hugging Face's cache, from torch; its KL is from torch's own dense model."""
        from benchmarks import kv_peers_torch as hf

        if self._torch is None:
            self._torch = hf.load(self._model.path)
        loaded = self._torch
        chosen = next(settings for name, settings in PEERS if (name, settings["bits"]) == (method, bits))
        layers = [hf.Quanto(**chosen)] * self._model.config.text.layers
        figures: dict[str, Any] = {"right": None, "by_kind": None, "kl": None}
        if "key_axis" not in chosen:
            exact = [None] * len(layers)
            predictions = (hf.answers(loaded, one, self._questions) for one in (exact, layers))
            result = gather([kv_peers.compare(self._questions, *predictions)], self._questions)
            figures = {"right": result.accuracy, "by_kind": result.by_kind, "kl": result.kl}
        if self._windows:
            whole = chosen["group"] if "key_axis" in chosen else 1
            figures["ppl"] = perplexity.gather(list(hf.score(loaded, layers, self._windows, whole))).ppl
        values = {str(tokens): {"all": hf.bits_per_value(loaded, layers, tokens)} for tokens in self._args.contexts}
        return {**figures, "form": chosen, "true_bits": values}


def _level(row: Row) -> str:
    return f"{row.budget:g}" if row.budget is not None else str(row.bits)


def _line(row: dict[str, Any]) -> str:
    return f"{row['method']:<36}{row['level']:>5}  KL {row['kl'] or 0:.5f}  ppl {row.get('ppl') or 0:.3f}"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(args, name) for name in ("samples", "calibration_samples", "contexts")}
    return {"model": name_of(args.model), **named, "text": judged.text(args)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    judged.add(parser, samples=192, windows=8)
    add("--calibration-samples", type=int, default=32, help="of the sensitivities (default: %(default)s)")
    add("--contexts", type=int, nargs="+", default=[2048, 640], help="tokens at which true bits are counted")
    add("--methods", nargs="+", metavar="NAME", help="only these rows, by their names (default: all)")
    add("--no-peers", action="store_true", help="without Hugging Face's cache, which needs torch and optimum-quanto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
