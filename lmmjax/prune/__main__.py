"""Prune a model: python -m lmmjax.prune --method wanda --sparsity 0.5 OUT.

Layer by layer, so that a model larger than memory passes through; interrupted, it goes on where it stopped. OUT is a
checkpoint like any other. Methods, allocations and figures: docs/pruning.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmmjax.errors import exit_code

METHODS = ("magnitude", "wanda", "wanda-cumulative", "ria", "lognorm", "pruner-zero", "sparsegpt", "admm")
UPDATES = ("sparsegpt", "admm")
ALLOCATIONS = ("uniform", "owl", "alphapruning", "ecoflap", "das", "mgaa")
# The names alone, since the functions behind them take seconds to import.


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after bad input, 130 after Ctrl-C (what was computed is kept then)."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = list(words)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of a whole run."""
    # Imported here, for it takes seconds, and `--help` and a mistyped flag need none of it.
    from lmmjax.prune import session

    return session.run(args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.prune", description=(__doc__ or "").split("\n", 2)[2])
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="the checkpoint to be made")
    add("--model", metavar="DIR", help="dense lmmjax checkpoint (default: the embedded model, tiny)")
    add("--method", default="lognorm", choices=METHODS, help="which weights go first (default: %(default)s)")
    add("--sparsity", type=float, metavar="S", help="share of the prunable weights to drop, exactly")
    add("--pattern", metavar="N:M", help="keep N of each M consecutive inputs, such as 2:4, in the place of --sparsity")
    add("--permute", action="store_true", help="look for the order of inputs in which the pattern keeps most")
    add("--update", default="none", choices=("none", *UPDATES), help="repair the weights that stay")
    add("--allocation", default="uniform", choices=ALLOCATIONS, help="sparsity by layer (default: %(default)s)")
    add("--plan", type=Path, metavar="F", help="a plan.json that says how much of each linear to drop")
    add("--data", metavar="SPEC", help="easy-vqa, or a JSONL file of questions about images (default: easy-vqa,"
        " if there is no --text)")  # fmt: skip
    add("--samples", type=int, default=128, metavar="N", help="questions to calibrate on (default: %(default)s)")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files to calibrate on")
    add("--windows", type=int, default=128, metavar="N", help="random windows of the text (default: %(default)s)")
    add("--length", type=int, metavar="N", help="tokens a window (default: 2048, or the model's context)")
    add("--tokens", default="all", choices=("all", "text", "drift"), help="which count (default: %(default)s)")
    add("--one-shot", action="store_true", help="statistics of the dense model, kept and shared by all methods;"
        " by default a layer's are taken behind the pruned layers before it")  # fmt: skip
    add("--statistics", type=Path, default=Path("runs/statistics"), metavar="DIR", help="where statistics and what is"
        " done of an interrupted run are kept (default: %(default)s)")  # fmt: skip
    add("--light", action="store_true", help="no Gram matrices: less memory and disk, no output errors in the report")
    add("--export", type=Path, metavar="HF_DIR", help="also write the result as an ordinary Hugging Face directory")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
