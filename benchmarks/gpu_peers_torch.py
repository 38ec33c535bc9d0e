"""Hugging Face's LLaVA on a GPU, as people run it: python -m benchmarks.gpu_peers_torch --cases 1x1024:static ...

`generate` of transformers in bfloat16 with random weights and a cache of each kind: dynamic (eager), static (which it
compiles by torch.compile) and quantized (optimum-quanto, 4 bits). A step's time is the median between two tokens.
A line of JSON a case on stdout, and the file anew, as soon as it is measured.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks.generate import Clock
from benchmarks.gpu_cases import MODELS, NEW, QUESTION
from lmmjax.files import write_atomic
from lmmjax.versions import installed

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
}
"""What `generate` is told of its cache."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    model, found = build(args.model), {"about": about(sys.argv[1:] if argv is None else argv), "model": args.model}

    def keep(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        print(json.dumps({"case": name, **figures}), flush=True)
        if args.out:
            write_atomic(Path(args.out), json.dumps(found, indent=1) + "\n")

    if args.prompt:
        keep("prompt", prompt(model))
    for text in args.cases:
        size, cache, *new = text.split(":")
        batch, context = map(int, size.split("x"))
        try:
            figures = decode(model, batch, context, cache, int(new[0]) if new else args.new, args.repeats)
        except Exception as error:  # nobody else need stop for it
            figures = {"failed": " ".join(str(error).split())[:300] or type(error).__name__}
        keep(f"{size} {cache}", figures)
    return 0


def about(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns where and how this runs; not by `lmmjax.machine`, which would have JAX take memory of the device."""
    names = ("torch", "transformers", "optimum-quanto")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_peers_torch", *arguments]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := installed(name))},
    }


def build(name: str) -> LlavaForConditionalGeneration:
    """Returns the model with transformers' own random weights."""
    config = LlavaConfig(**MODELS[name])
    with _making(torch.bfloat16), torch.device(_device()):
        return LlavaForConditionalGeneration(config).eval()


@torch.inference_mode()
def decode(
    model: LlavaForConditionalGeneration, batch: int, context: int, cache: str, new: int, repeats: int
) -> dict[str, Any]:
    """Returns milliseconds between two tokens after a prompt of all but the last `new` tokens, and to the first one.

    A first answer compiles and is not counted.
    """
    ids = torch.randint(3, 1000, (batch, context - new), device=_device())
    _reset_peak()
    began = time.perf_counter()
    _steps(model, ids, cache, new)
    warm = time.perf_counter() - began
    found = [_steps(model, ids, cache, new) for _ in range(repeats)]
    ms = [1e3 * statistics.median(steps) for _, steps in found]
    return {
        "ms": statistics.median(ms),
        "runs": ms,
        "first_ms": 1e3 * statistics.median(first for first, _ in found),
        "warm_s": warm,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }


@torch.inference_mode()
def prompt(model: LlavaForConditionalGeneration, rounds: int = 5) -> dict[str, Any]:
    """Returns milliseconds of the tower with projector, and of the decoder over one image and a question."""
    vision: Any = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, device=_device(), dtype=torch.bfloat16)
    ids = torch.randint(3, 1000, (1, patches + QUESTION), device=_device())
    text: Any = model.model.language_model

    def see() -> Any:
        return model.get_image_features(pixel_values=pixels)

    def read() -> Any:
        return text(input_ids=ids, use_cache=True)

    return {"vision_ms": _median_ms(see, rounds), "prefill_ms": _median_ms(read, rounds), "tokens": patches + QUESTION}


def _steps(model: LlavaForConditionalGeneration, ids: torch.Tensor, cache: str, new: int) -> tuple[float, list[float]]:
    """Returns the seconds to the first token, and those of each one after it."""
    clock, generate = Clock(), cast(Any, model).generate
    began = time.perf_counter()
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
        eos_token_id=None,
        pad_token_id=0,
        **CACHES[cache],
    )
    first, *times = clock.times[1:]
    # The second token's step may still be captured as a graph.
    return first - began, [b - a for a, b in itertools.pairwise(times)]


def _median_ms(run: Any, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[2:])


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def _making(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_peers_torch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", choices=list(MODELS), default="7b", help="default: %(default)s")
    parser.add_argument("--cases", nargs="*", default=[], metavar="BxS:CACHE[:NEW]", help=f"CACHE: {', '.join(CACHES)}")
    parser.add_argument("--prompt", action="store_true", help="time tower and prefill of one image, too")
    parser.add_argument("--out", help="a file; default: none")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="answers of each case; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
