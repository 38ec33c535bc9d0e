"""What converting a checkpoint takes in memory and time: python -m benchmarks.convert [--layers 29 58]

Random bfloat16 weights of a decoder 1,024 wide, in two depths: if memory is a few layers', it does not grow with
the file. Peaks are those of the command's own process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import machine
from convert.writing import write_hf
from lmmjax import llava
from lmmjax.checkpoint import EMBEDDED, carried_files
from lmmjax.config import from_hf

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[29, 58], metavar="N")
    parser.add_argument("--name", default="convert", help="of the file in benchmarks/results")
    args = parser.parse_args(argv)
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as place:
            rows.append({"layers": layers, **measure(layers, Path(place))})
        print(json.dumps(rows[-1]), flush=True)
    print(machine.save(args.name, {"rows": rows}))
    return 0


def measure(layers: int, place: Path) -> dict[str, float]:
    """Returns the checkpoint's size, and peak memory and seconds of its conversion and export."""
    write_random(layers, place / "hf")
    size = (place / "hf" / "model.safetensors").stat().st_size
    there = timed("convert.hf", str(place / "hf"), str(place / "lmmjax"))
    back = timed("convert.export", str(place / "lmmjax"), str(place / "back"))
    return {
        "gigabytes": size / 1e9,
        **{f"convert_{name}": value for name, value in there.items()},
        **{f"export_{name}": value for name, value in back.items()},
    }


def write_random(layers: int, target: Path) -> None:
    """Writes a random Hugging Face checkpoint with the embedded model's tower and tokenizer."""
    raw = json.loads((EMBEDDED / "config.json").read_text())
    changes = WIDE | {"head_dim": 64, "num_hidden_layers": layers, "vocab_size": 32064}
    raw["text_config"] = raw["text_config"] | changes
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llava.init(from_hf(raw), jax.random.key(0)))
    write_hf(params, raw, target, carried_files(EMBEDDED))


def timed(module: str, *arguments: str) -> dict[str, float]:
    """Returns peak memory (GB) and seconds of one command, run by a small process that waits for it alone."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL,"
        " stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    began = time.monotonic()
    run = [sys.executable, "-c", program, sys.executable, "-m", module, *arguments]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return {"peak_gigabytes": int(done.stdout) * 1024 / 1e9, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
