"""All that is measured on a GPU, section by section: python -m benchmarks.gpu [SECTION ...] [--minutes 9] [--smoke]

A section is a command of its own in a process of its own: memory is free again behind it, and one that fails or runs
out of time leaves the others theirs. Each has its figures on disk as soon as they are taken, under benchmarks/results.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import machine
from lmmjax.errors import InputError, exit_code


class Section(NamedTuple):
    """A command after `python -m`, the same at a size for CPUs, and the most seconds that it may take."""

    command: str
    smoke: str
    seconds: int


SECTIONS = {
    "tests": Section("pytest -m gpu -n 8", "pytest -m gpu --collect-only", 150),
    "attention": Section(
        "kernels.bench --rows 32x4096 8x16384 --minutes 1.5 --resume --out {results}/attend-{device}.json",
        "kernels.bench --smoke --minutes 0.2 --resume --out {results}/attend-{device}.json",
        110,
    ),
    "weights": Section("benchmarks.weights_gpu --models 7b --rows 1 8", "benchmarks.weights_gpu --smoke", 90),
    "model": Section(
        "benchmarks.gpu_model --prompt --new 64 --out {results}/model-7b-{device}.json --cases 1x1024:16:bf16"
        " 16x4096:16:bf16 16x4096:4:bf16 '1x1024:16:2:4 int8' 1x1024:16:int8 16x4096:2:bf16 '16x4096:4:2:4 int8'"
        " 1x1024:4:bf16 16x4096:8:bf16 --profile prompt '1x1024 kv16 2:4 int8' '16x4096 kv4 bf16'",
        "benchmarks.gpu_model --model smoke --new 16 --out {results}/model-smoke-{device}.json --cases 1x64:16:bf16",
        240,
    ),
    "transformers": Section(
        "benchmarks.gpu_peers_torch --prompt --out {results}/transformers-7b-{device}.json --cases 1x1024:dynamic:32"
        " 16x4096:dynamic:12 1x1024:static:64 16x4096:static:32 16x4096:quantized:6",
        "benchmarks.gpu_peers_torch --model smoke --out {results}/transformers-smoke-{device}.json --new 8"
        " --cases 1x64:dynamic",
        180,
    ),
    "trial": Section(
        "benchmarks.gpu_trial --out {results}/trial-7b-{device}.json",
        "benchmarks.gpu_trial --model smoke --tokens 1300 --batch 1 --trials 1"
        " --out {results}/trial-smoke-{device}.json",
        150,
    ),
    "pruning": Section("benchmarks.prune --shapes 7b --rounds 3", "benchmarks.prune --smoke", 150),
}
"""The most telling first: the time may not last for all."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_code(lambda: run(args, time.monotonic()))


def run(args: argparse.Namespace, began: float) -> int:
    """Runs the sections one after the other until the time is over; returns 1 if one of them did not end well."""
    if unknown := set(args.sections) - set(SECTIONS):
        raise InputError(f"SECTION: got {', '.join(sorted(unknown))}, expected some of {', '.join(SECTIONS)}")
    device, worst = "cpu" if args.smoke else _device(), 0
    for name in args.sections or SECTIONS:
        section, left = SECTIONS[name], began + 60 * args.minutes - time.monotonic()
        command = (section.smoke if args.smoke else section.command).format(results=args.results, device=device)
        said = _hold(command, min(section.seconds, left)) if left > 0 else "left out: the time is over"
        print(f"== {name}: {said}", file=sys.stderr, flush=True)
        worst = max(worst, said != "done")
    return worst


def _hold(command: str, seconds: float) -> str:
    """Returns how a command ended; it has these seconds."""
    print(f"== python -m {command}", file=sys.stderr, flush=True)
    try:
        ended = subprocess.run([sys.executable, "-m", *shlex.split(command)], timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "done" if ended.returncode == 0 else f"ended with {ended.returncode}"


def _device() -> str:
    """Returns the first GPU's name as part of a file's; asked of the driver, so that no memory is taken."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise InputError("device: nvidia-smi names none, expected one; --smoke runs tiny sizes on a CPU") from None
    return machine.slug(names.splitlines()[0].strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--minutes", type=float, default=9, help="for all sections together; default: 9")
    parser.add_argument("--results", default=str(machine.RESULTS), help="a folder; default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs; for CPUs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
