"""Pack a pruned model's weights without their zeros: python -m lmmjax.pack --model DIR [--bits 8] OUT.

OUT is a checkpoint like any other, smaller on disk and in memory; lmmjax.generate and lmmjax.evaluate read it as it is,
convert.export writes it out dense again. Formats and figures: docs/weights.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmmjax.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after bad input."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = list(words)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of a whole run."""
    # Imported here, for it takes seconds, and `--help` and a mistyped flag need none of it.
    from lmmjax.pack import session

    return session.run(args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.pack", description=(__doc__ or "").split("\n", 2)[2])
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="the checkpoint to be made")
    add("--model", metavar="DIR", help="a checkpoint, pruned or not (default: the embedded model, tiny)")
    add("--weights", default="auto", metavar="KIND", help="dense, bitmap, N:M, or auto: the smallest that a linear's"
        " zeros allow (default: %(default)s)")  # fmt: skip
    add("--bits", type=int, choices=(8, 4), help="of the values; by default they stay floats, unchanged")
    add("--group", type=int, metavar="N", help="inputs that share a scale (default: a row at 8 bits, 64 at 4)")
    add("--head", type=int, choices=(8, 4), help="bits of what makes the logits, too: the head, or the embeddings that"
        " are both; left alone by default")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
