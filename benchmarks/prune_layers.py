"""What pruning each layer alone costs, beside what allocations drop there: python -m benchmarks.prune_layers

An allocation gains where it drops less of the layers whose weights are missed more. A layer is pruned by the score that
allocations are compared under, without an update, all others stay dense. Run again, it goes on where it stopped.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import judged, machine, prune_quality
from benchmarks.judged import found_in, name_of
from benchmarks.prune_cells import ALLOCATED, Cell
from benchmarks.prune_quality import Contest, rests_on
from lmmjax import runtime
from lmmjax.config import TextConfig
from lmmjax.errors import exit_code
from lmmjax.prune.allocations import ALLOCATIONS

LEVELS = ("0.5", "0.7")


class Layer(NamedTuple):
    """A layer that is pruned alone, as much of it as goes at this level."""

    level: str
    layer: int


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures the layers that are missing in benchmarks/results/prune-layers-NAME.json; returns 0."""
    runtime.prepare()
    path = machine.RESULTS / f"prune-layers-{args.name or name_of(args.model)}.json"
    settings, model = rests_on(args), judged.dense(args)
    found = found_in(path, settings, "layers")
    done = {Layer(row["level"], row["layer"]) for row in found}
    every = [Layer(level, i) for level in args.levels for i in range(model.config.text.layers)]
    if missing := [layer for layer in every if layer not in done]:
        contest = Contest(model, args)
        dropped = functools.cache(lambda level: _dropped(contest, model.config.text, level))
        judged.measure(
            path, settings, "layers", found, missing, lambda one: _row(contest, dropped(one.level), one), _line
        )
    print(path)
    return 0


def _row(contest: Contest, dropped: dict[str, list[float]], one: Layer) -> dict[str, Any]:
    figures = contest.measure(Cell(one.level, ALLOCATED), (one.layer,))
    return {**one._asdict(), **figures, "dropped": {name: each[one.layer] for name, each in dropped.items()}}


def _dropped(contest: Contest, text: TextConfig, level: str) -> dict[str, list[float]]:
    """Returns which share of each layer's weights each allocation drops."""
    whole = text.prunable // text.layers
    return {
        name: [text.dropped(row) / whole for row in contest.drops(Cell(level, ALLOCATED, allocation=name))]
        for name in ALLOCATIONS
    }


def _line(row: dict[str, Any]) -> str:
    text = f"  text {row['text_kl']:.4f}" if "text_kl" in row else ""
    return f"{row['level']:>4} layer {row['layer']:>2}  KL {row['kl']:.4f}{text}  {row['seconds']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prune_layers", description=(__doc__ or "").split("\n")[0]
    )
    prune_quality.add(parser, samples=32)
    add = parser.add_argument
    add("--levels", nargs="+", default=LEVELS, metavar="S")
    add("--name", metavar="NAME", help="the file is benchmarks/results/prune-layers-NAME.json (default: the model's)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
