"""python -m search.tpe --budget 0.5: the search as a command.

Finds how much of every layer to prune and how many bits its keys and values take, under an exact budget, and
writes the plan, the compressed checkpoint and a report into OUT. Run again, it goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmmjax import cache_flags
from lmmjax.errors import exit_code
from search.settings import ALLOCATIONS, EFFORTS, OBJECTIVES, SCORES, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after bad input, 130 after Ctrl-C (the best so far is written then too)."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = words
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of a whole run of the search."""
    # Imported here, for it takes seconds, and `--help` and a mistyped flag need none of it.
    from search import session

    return session.run(args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m search.tpe",
        description=(__doc__ or "").split("\n", 2)[2],
        epilog=efforts(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings  # the class, for an instance would import what takes seconds
    add = parser.add_argument
    add("--budget", type=float, required=True, metavar="B", help="share of the prunable weights to keep, exactly")
    add("--kv-budget", type=float, metavar="F", help="share of the dense KV cache's bytes to use at most (default: B)")
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model, tiny)")
    add("--data", default=default.data, metavar="SPEC", help="easy-vqa, or a JSONL file of questions about images")
    add("--trials", type=int, metavar="N", help="finished trials to end with (default: see below)")
    add("--blocks", default=default.blocks, metavar="N|layer|linear", help="which linears share a sparsity")
    add("--box", type=float, default=default.box, help="how far a wished sparsity may lie from uniform")
    add("--objective", default=default.objective, choices=OBJECTIVES, help="what is made small (accuracy: its lack)")
    add("--score", default=default.score, choices=SCORES, help="which weights go first")
    add("--context", type=int, metavar="N", help="tokens at which the cache is measured (default: the model's context)")
    add("--window", type=int, default=0, metavar="N", help="latest tokens kept exact")
    add("--calibration-samples", type=int, metavar="N", help="questions that the scores' statistics are taken on")
    add("--calibration-tokens", default=default.calibration_tokens, choices=("all", "text"))
    add("--search-samples", type=int, metavar="N", help="questions that every trial is judged by")
    add("--report-samples", type=int, metavar="N", help="questions that the end result is compared on")
    add("--sensitivity", metavar="FILE", help="of lmmjax.sensitivity: more starts, the widths that hurt least")
    add(
        "--allocations",
        metavar="NAME,...",
        help=f"more starts, published sparsities by layer: {', '.join(ALLOCATIONS)}",
    )
    add("--batch", type=int, default=16, metavar="N", help="samples evaluated at once (default: %(default)s)")
    add("--storage", metavar="PATH|URL", help="Optuna's journal or database (default: OUT/study.journal)")
    add("--seed", type=int, default=default.seed)
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/<model>-<budget>)")
    cache_flags.add(parser)
    return parser


def efforts() -> str:
    """Returns what the numbers of trials and samples are when they are left open, as a table."""
    names = ("trials", "calibration-samples", "search-samples", "report-samples")
    lines = ["trials and samples that are left open follow the model's prunable weights:", ""]
    lines.append(f"{'weights':>16}" + "".join(f"{'--' + name:>23}" for name in names))
    for most, effort in EFFORTS.items():
        size = f"up to {most / 1e6:.0f} M" if most < float("inf") else "more"
        lines.append(f"{size:>16}" + "".join(f"{number:>23}" for number in effort))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
