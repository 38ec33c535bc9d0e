"""How much every layer's keys and values suffer from each width: python -m lmmjax.sensitivity.

Writes OUT/sensitivity.json, which a search can start from, and a picture of it. docs/sensitivity.md says what the
figures mean.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmjax import cache_flags
from lmmjax.data import EASY_VQA, located
from lmmjax.errors import InputError, exit_code

if TYPE_CHECKING:
    from lmmjax.checkpoint import Checkpoint
    from lmmjax.data import Encoded
    from lmmjax.kv_error import Sensitivity
    from lmmjax.plan import CacheFormat

EMBEDDED = "tiny"
"""What the embedded model is called."""
LENGTH = 512
"""Tokens of a window of text, if the model's context has room for them: logits of all of them exist at once."""
FILE = "sensitivity.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after bad input, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(words)
    args.words = list(words)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures, writes the figures and their picture into OUT, and prints them."""
    # Imported here, for they take seconds, and `--help` and a mistyped flag need none of them.
    from lmmjax import checkpoint, files, kv_picture, machine, runtime

    runtime.prepare()
    _check(args)
    form = cache_flags.read(args)
    out = args.out or Path("runs") / f"sensitivity-{_name(args)}"
    stored = checkpoint.load(checkpoint.resolve(args.model))
    checkpoint.require_dense(stored.path, stored.plan)
    encoded = _encoded(args, stored)
    with files.alone(out, out / ".lock", "--out"):
        found = _measured(stored, encoded, form, args.batch)
        about = {"about": machine.facts("lmmjax.sensitivity", args.words), "settings": _settings(args, stored, form)}
        figures = {**about, **as_json(found)}
        files.write_atomic(out / "sensitivity.png", kv_picture.draw(figures))
        files.write_atomic(out / FILE, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    print(f"{table(figures)}\n\nwritten: {out / FILE}, {out / 'sensitivity.png'}")
    return 0


def as_json(found: "Sensitivity") -> dict[str, Any]:
    """Returns the measures as plain values: tables of a row a layer and a column a width."""
    from lmmjax.kv_error import WIDTHS

    measures = {"attention_error": found.error, "loss_change": found.change}
    tables = {name: {side: rows.tolist() for side, rows in of.items()} for name, of in measures.items()}
    return {"bits": list(WIDTHS), "loss": found.loss, **tables}


def table(figures: Mapping[str, Any]) -> str:
    """Returns both measures for people to read: a line a layer, the widths of keys and values side by side."""
    bits, lines = figures["bits"], [f"loss {figures['loss']:.4g} nats a token"]
    for name, title in (
        ("loss_change", "change of the loss to first order, nats a token"),
        ("attention_error", "relative error of the attention's output"),
    ):
        columns = [f"{side} {width}" for side in figures[name] for width in bits]
        lines += ["", title, "layer" + "".join(f"{column:>11}" for column in columns)]
        for layer, row in enumerate(zip(*figures[name].values(), strict=True)):
            lines.append(f"{layer:>5}" + "".join(f"{value:>11.3g}" for side in row for value in side))
    return "\n".join(lines)


def _encoded(args: argparse.Namespace, stored: "Checkpoint") -> "Encoded":
    """Returns the samples: questions, whose answers are predicted, or windows of text, all tokens but the first.

    Both are drawn as a calibration draws them; questions are those of a search of that size and seed.
    """
    from lmmjax.calibrate import samples
    from lmmjax.prompt import Processor

    data = None if args.text else args.data or EASY_VQA
    recipe = samples.Recipe(data, args.samples, tuple(args.text), args.samples, _length(args, stored), args.seed)
    (encoded,) = samples.encode(Processor.load(stored.path, stored.config), recipe)
    if not args.text:
        return encoded
    predicted = encoded.is_answer.copy()
    predicted[:, 1:] = True
    return dataclasses.replace(encoded, is_answer=predicted)


def _length(args: argparse.Namespace, stored: "Checkpoint") -> int:
    """Returns the tokens of a window of text."""
    context = stored.config.text.context
    if (args.length or 0) > context:
        raise InputError(f"--length: got {args.length}, expected at most the model's context of {context}")
    return args.length or min(LENGTH, context)


def _measured(stored: "Checkpoint", encoded: "Encoded", form: "CacheFormat", size: int) -> "Sensitivity":
    """Returns the measures, with a bar on stderr."""
    from tqdm import tqdm

    from lmmjax import kv_error

    size = min(size, len(encoded.kinds))
    parts = kv_error.sums(stored.config, stored.params, encoded, form, size)
    return kv_error.gather(list(tqdm(parts, total=-(-len(encoded.kinds) // size), unit="batch")))


def _settings(args: argparse.Namespace, stored: "Checkpoint", form: "CacheFormat") -> dict[str, Any]:
    """Returns what decides the figures; `weights` tells models apart, whatever their directories are called."""
    from lmmjax import weights

    return {
        "model": _name(args),
        "weights": weights.digest(stored.params).hexdigest()[:16],
        "data": _data(args),
        "samples": args.samples,
        **({"length": _length(args, stored)} if args.text else {}),
        "seed": args.seed,
        "cache": dataclasses.asdict(form),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.sensitivity", description=(__doc__ or "").split("\n", 2)[2])
    add = parser.add_argument
    add("--model", metavar="DIR", help="an lmmjax checkpoint; default: the embedded model")
    add("--data", metavar="SPEC", help="easy-vqa (the default), or a JSONL file of questions about images")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files, in the place of questions")
    add("--samples", type=int, default=128, metavar="N", help="questions, drawn as a search draws its calibration set,"
        " or windows of the text (default: %(default)s)")  # fmt: skip
    add("--length", type=int, metavar="N", help=f"tokens a window of text (default: {LENGTH}, or the model's context)")
    add("--batch", type=int, default=8, metavar="N", help="samples at once (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the questions that are drawn (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/sensitivity-<model>)")
    cache_flags.add(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    for flag, got, least in (
        ("--samples", args.samples, 1),
        ("--length", args.length, 2),
        ("--batch", args.batch, 1),
        ("--seed", args.seed, 0),
    ):
        if got is not None and got < least:
            raise InputError(f"{flag}: got {got}, expected at least {least}")
    if args.text and args.data is not None:
        raise InputError(f"--data: got {args.data} beside --text; expected one of the two")
    if args.length is not None and not args.text:
        raise InputError(f"--length: got {args.length} without --text, which alone uses it; give both")


def _data(args: argparse.Namespace) -> str:
    """Returns what the samples come from, its paths absolute."""
    if args.text:
        return ", ".join(str(file.resolve()) for file in args.text)
    return located(args.data or EASY_VQA)


def _name(args: argparse.Namespace) -> str:
    return Path(args.model).resolve().name if args.model else EMBEDDED


if __name__ == "__main__":
    sys.exit(main())
