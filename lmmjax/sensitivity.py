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
from lmmjax.data import EASY_VQA
from lmmjax.errors import InputError, exit_code

if TYPE_CHECKING:
    from lmmjax.checkpoint import Checkpoint
    from lmmjax.data import Encoded
    from lmmjax.kv_error import Sensitivity
    from lmmjax.plan import CacheFormat

EMBEDDED = "tiny"
"""What the embedded model is called."""
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
    from lmmjax import checkpoint, data, files, kv_picture, machine, runtime
    from lmmjax.prompt import Processor

    runtime.prepare()
    _check(args)
    form = cache_flags.read(args)
    out = args.out or Path("runs") / f"sensitivity-{_name(args)}"
    stored = checkpoint.load(checkpoint.resolve(args.model))
    if stored.plan is not None:
        raise InputError(f"--model: {stored.path} is compressed already; give the dense checkpoint it was made from")
    # As `prune.replay` draws them: a search's calibration set of that size and seed, none of its other two.
    (samples,) = data.disjoint(data.load(args.data, "train"), [args.samples], args.seed)
    with files.alone(out, out / ".lock", "--out"):
        encoded = data.encode(Processor.load(stored.path, stored.config), samples)
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
        "data": args.data if args.data == EASY_VQA else str(Path(args.data).resolve()),
        "samples": args.samples,
        "seed": args.seed,
        "cache": dataclasses.asdict(form),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmmjax.sensitivity", description=(__doc__ or "").split("\n", 2)[2])
    add = parser.add_argument
    add("--model", metavar="DIR", help="an lmmjax checkpoint; default: the embedded model")
    add("--data", default=EASY_VQA, metavar="SPEC", help="easy-vqa, or a JSONL file of questions about images")
    add("--samples", type=int, default=128, metavar="N", help="questions, drawn as a search draws its calibration set")
    add("--batch", type=int, default=8, metavar="N", help="samples at once (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the questions that are drawn (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/sensitivity-<model>)")
    cache_flags.add(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    for flag, got, least in (("--samples", args.samples, 1), ("--batch", args.batch, 1), ("--seed", args.seed, 0)):
        if got < least:
            raise InputError(f"{flag}: got {got}, expected at least {least}")


def _name(args: argparse.Namespace) -> str:
    return Path(args.model).resolve().name if args.model else EMBEDDED


if __name__ == "__main__":
    sys.exit(main())
