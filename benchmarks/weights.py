"""Packed weights on a CPU: python -m benchmarks.weights --model runs/smol [--llama PYTHON GGUF].

Products of one row in every format, against plain reading, XLA and torch; and decoding of a whole model against
Hugging Face torch and llama.cpp, each in a process of its own, by turns.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, weights_decode, weights_products
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures the sections that are asked for, and keeps the others' figures; returns 0."""
    path = machine.RESULTS / f"{args.name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if "products" in args.section:
        known["products"] = {
            "about": machine.facts(),
            **weights_products.measure(args.repeats, weights_products.SHAPES),
        }
        print(_products(known["products"]))
    if "decode" in args.section:
        llama = (args.llama[0], Path(args.llama[1])) if args.llama else None
        sides = weights_decode.measure(args.model, args.work / args.model.name, args.rounds, args.tokens, llama)
        known["decode"] = {"about": machine.facts(), "model": args.model.name, "tokens": args.tokens, "sides": sides}
        print(_decode(known["decode"]))
    write_atomic(path, json.dumps(known, indent=1) + "\n")
    print(f"written: {path}", file=sys.stderr)
    return 0


def _products(found: dict[str, Any]) -> str:
    lines = [f"plain reading: {found['stream_bytes_per_s'] / 1e9:.1f} GB/s"]
    for shape, sides in found["shapes"].items():
        for side, one in sides.items():
            rate = f"{one['bytes_per_s'] / 1e9:5.1f} GB/s, {one['of_stream']:4.0%} of reading"
            lines.append(f"{shape:<12} {side:<16} {one['ms']['median']:8.3f} ms  {rate}")
    return "\n".join(lines)


def _decode(found: dict[str, Any]) -> str:
    peer = found["sides"]["transformers, bfloat16"]["ms_per_token"]["median"]
    lines = []
    for name, one in found["sides"].items():
        ms = one["ms_per_token"]["median"]
        sizes = f"weights {one['weights_bytes'] / 1e6:6.0f} MB  peak {one['peak_bytes'] / 1e6:6.0f} MB"
        lines.append(f"{name:<24} {1e3 / ms:6.1f} tokens/s  {peer / ms:4.2f}x transformers bfloat16  {sizes}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--section", nargs="+", choices=("products", "decode"), default=["products", "decode"])
    add(
        "--model",
        type=Path,
        default=Path("runs/smol"),
        metavar="DIR",
        help="dense lmmjax checkpoint (default: %(default)s)",
    )
    add("--work", type=Path, default=Path("runs/weights"), metavar="DIR", help="where its packed forms are kept")
    add("--llama", nargs=2, metavar=("PYTHON", "GGUF"), help="an interpreter that has llama_cpp, and its model")
    add("--rounds", type=int, default=3, help="processes of each side (default: %(default)s)")
    add("--tokens", type=int, default=64, help="decoded by a run (default: %(default)s)")
    add("--repeats", type=int, default=15, help="of products (default: %(default)s)")
    add("--name", default="weights-cpu", help="of the file under benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
