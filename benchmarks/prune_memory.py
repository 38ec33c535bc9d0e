"""What pruning a model of 7B's width takes in memory: python -m benchmarks.prune_memory [--layers 2 4]

Random bfloat16 weights of LLaVA-1.5 7B's decoder in two depths: if a layer at a time is held, the peak does not grow
with the file, and with all 32 layers it is the same. Hidden states grow with the samples, and are said beside it.
Peaks are those of the command's own process, with float32 arithmetic on a CPU. Every figure is written as soon as it is
there; run again, the benchmark goes on where it stopped.
"""

import argparse
import functools
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import judged, machine
from benchmarks.convert import timed
from lmmjax import checkpoint, llava
from lmmjax.checkpoint import EMBEDDED, carried_files
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import exit_code

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 32064,
}
METHODS = {"wanda": ("--method", "wanda", "--light"), "sparsegpt": ("--method", "sparsegpt")}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures what is missing in benchmarks/results/NAME.json, a row a method and depth; returns 0."""
    path, settings = machine.RESULTS / f"{args.name}.json", {"windows": args.windows, "length": args.length}
    found = judged.found_in(path, settings, "rows")
    done = {(row["layers"], row["method"]) for row in found}
    missing = [case for case in itertools.product(args.layers, args.methods) if case not in done]
    with tempfile.TemporaryDirectory(dir=args.scratch) as place:
        row = functools.partial(measure, Path(place), args)
        judged.measure(path, settings, "rows", found, missing, row, json.dumps)
    print(path)
    return 0


def measure(place: Path, args: argparse.Namespace, case: tuple[int, str]) -> dict[str, Any]:
    """Returns the checkpoint's size, and the peak memory of pruning it to a half."""
    layers, method = case
    model, text = place / f"model-{layers}", place / "text.txt"
    if not model.exists():
        write_random(layers, model)
        words = random.Random(0).choices(
            "what color is the shape in this image a circle red blue yes no".split(), k=20000
        )
        text.write_text(" ".join(words))
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    words = ["--model", str(model), "--text", str(text), "--windows", str(args.windows), "--length", str(args.length)]
    words += ["--sparsity", "0.5", "--statistics", str(place / "statistics"), *METHODS[method]]
    peak = timed("lmmjax.prune", *words, str(place / f"{method}-{layers}"))["peak_gigabytes"]
    return {"layers": layers, "method": method, "gigabytes": size / 1e9, "peak_gigabytes": peak}


def write_random(layers: int, target: Path) -> None:
    """Writes a random checkpoint with the embedded model's tower and tokenizer, a leaf at a time."""
    raw = json.loads((EMBEDDED / "config.json").read_text())
    raw["text_config"] = raw["text_config"] | SHAPE | {"num_hidden_layers": layers}
    config, rng = from_hf(raw), np.random.default_rng(0)
    with checkpoint.writer(target, json.dumps(raw).encode(), carried_files(EMBEDDED)) as leaves:
        for name, leaf in _shapes(config).items():
            scale = leaf.shape[0] ** -0.5 if len(leaf.shape) > 1 else 1
            values = rng.standard_normal(leaf.shape, np.float32) if len(leaf.shape) > 1 else np.ones(leaf.shape)
            leaves.add(name, (values * scale).astype(ml_dtypes.bfloat16))


def _shapes(config: LlavaConfig) -> dict[str, Any]:
    return flatten_dict(jax.eval_shape(lambda: llava.init(config, jax.random.key(0))), sep=".")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prune_memory", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[2, 4], metavar="N")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--windows", type=int, default=1, help="of text to calibrate on (default: %(default)s)")
    add("--length", type=int, default=2048, help="tokens a window (default: %(default)s)")
    add("--scratch", type=Path, metavar="DIR", help="where some 10 GB are written (default: the system's)")
    add("--name", default="prune-memory", help="of the file in benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
