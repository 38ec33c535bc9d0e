"""Generation beside Hugging Face torch: python -m benchmarks.generate [--case NAME]...

Same weights in float32, same prompt, same number of greedy tokens, same cores, in one process, by turns. "First
token" is everything up to it: vision tower, prefill and one token. Decoding is timed from there to the last token.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CASES: dict[str, dict[str, Any] | None] = {
    "tiny": None,
    "smollm2-135m": {
        "model_type": "llava",
        "image_token_index": 16,
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 16,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    },
}
"""Hugging Face configs that get random weights; None is the embedded model with its own."""

QUESTION_TOKENS = 12
REST_SECONDS = 0.5
"""Between two runs: torch's threads spin for a while after their work, and would slow whoever comes next."""


class Case(NamedTuple):
    """One model on both sides, a prompt for it, and how many tokens are asked for."""

    config: Any
    params: Any
    peer: Any
    tokens: np.ndarray
    pixels: np.ndarray
    count: int


class Timing(NamedTuple):
    first_ms: float
    decode_tokens_per_s: float
    ids: list[int]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks import machine
    from lmmjax.errors import exit_code

    def command() -> int:
        figures = {}
        for name in args.case or list(CASES):
            with _open(name, args.tokens) as case:
                figures[name] = _measure(case, args.repeats)
            print(_row(name, figures[name]))
        path = machine.save(args.name, {"cases": figures})
        print(f"written: {path}", file=sys.stderr)
        return 0

    return exit_code(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate", description="Time generation beside Hugging Face torch."
    )
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated; default: all")
    parser.add_argument("--tokens", type=int, default=64, help="written by each run; default: 64")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each side, by turns; default: 7")
    parser.add_argument("--threads", type=int, default=None, help="cores that both may use; default: all")
    parser.add_argument("--name", default="generate", help="of the file under benchmarks/results")
    return parser


@contextlib.contextmanager
def _open(name: str, count: int) -> Iterator[Case]:
    """Yields the case with both models loaded; one that needs a checkpoint on disk has it only for that long."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as scratch:
        config, params, directory = _weights(name, Path(scratch) / "model")
        peer = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        rng = np.random.default_rng(0)
        vision = config.vision
        text = rng.integers(20, min(config.text.vocab, 1000), QUESTION_TOKENS)
        tokens = np.concatenate(
            [[1], np.full(vision.image_tokens, config.image_token), text[text != config.image_token]]
        )
        pixels = rng.standard_normal((1, vision.channels, vision.image_size, vision.image_size)).astype(np.float32)
        yield Case(config, params, peer, tokens[None].astype(np.int32), pixels, count)


def _weights(name: str, directory: Path) -> tuple[Any, Any, Path]:
    """Returns our config and params of a case, and the directory where transformers finds the same weights."""
    import jax

    from convert.writing import write_hf
    from lmmjax import checkpoint, llava
    from lmmjax.config import from_hf

    raw = CASES[name]
    if raw is None:
        loaded = checkpoint.load(checkpoint.resolve(None), "float32")
        return loaded.config, loaded.params, checkpoint.EMBEDDED
    config = from_hf(raw)
    params = llava.init(config, jax.random.key(0))
    write_hf(params, raw, directory)
    return config, params, directory


def _measure(case: Case, repeats: int) -> dict[str, Any]:
    """Returns medians and all runs of both sides, and their ratios: above 1, lmmjax is faster."""
    from benchmarks.machine import spread

    sides: dict[str, Callable[[Case], Timing]] = {"lmmjax": _ours, "transformers": _theirs}
    warm = {side: run(case) for side, run in sides.items()}  # compiles, allocates, fills the caches
    runs: dict[str, list[Timing]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            time.sleep(REST_SECONDS)
            runs[side].append(run(case))
    figures: dict[str, Any] = {
        side: {
            "first_token_ms": spread([timing.first_ms for timing in timings]),
            "decode_tokens_per_s": spread([timing.decode_tokens_per_s for timing in timings]),
        }
        for side, timings in runs.items()
    }
    ours, theirs = figures["lmmjax"], figures["transformers"]
    return {
        "prompt_tokens": case.tokens.size,
        "new_tokens": case.count,
        "same_tokens": warm["lmmjax"].ids == warm["transformers"].ids,
        **figures,
        "first_token_speedup": theirs["first_token_ms"]["median"] / ours["first_token_ms"]["median"],
        "decode_speedup": ours["decode_tokens_per_s"]["median"] / theirs["decode_tokens_per_s"]["median"],
    }


def _ours(case: Case) -> Timing:
    import jax

    from lmmjax import engine

    config, params = case.config, case.params
    began = time.perf_counter()
    images = engine.encode_images(config, params, case.pixels)
    state = engine.start(config, params, case.tokens, np.array([case.tokens.size]), images, max_tokens=case.count)
    jax.block_until_ready(state)
    first = time.perf_counter()
    ids = engine.answers(engine.decode(config, params, state, case.count))[0]
    return _timing(began, first, time.perf_counter(), ids)


def _theirs(case: Case) -> Timing:
    """Times `generate`, as people call it; a streamer notes when the first token came."""
    import torch

    clock = Clock()
    prompt = torch.from_numpy(case.tokens).long()
    with torch.inference_mode():
        began = time.perf_counter()
        ids = case.peer.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=torch.from_numpy(case.pixels),
            max_new_tokens=case.count,
            min_new_tokens=case.count,
            do_sample=False,
            eos_token_id=None,
            streamer=clock,
        )
        ended = time.perf_counter()
    return _timing(began, clock.times[1], ended, ids[0, case.tokens.size :].tolist())


class Clock:
    """A streamer for transformers' `generate` that only looks at the time: first the prompt, then each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def _timing(began: float, first: float, ended: float, ids: list[int]) -> Timing:
    return Timing(1e3 * (first - began), (len(ids) - 1) / (ended - first), ids)


def _row(name: str, figures: dict[str, Any]) -> str:
    cells = [
        f"{side}: first token {figures[side]['first_token_ms']['median']:.1f} ms,"
        f" {figures[side]['decode_tokens_per_s']['median']:.1f} tokens/s"
        for side in ("lmmjax", "transformers")
    ]
    ratios = f"{figures['first_token_speedup']:.2f}x, {figures['decode_speedup']:.2f}x"
    return f"{name} | {' | '.join(cells)} | {ratios} | same tokens: {figures['same_tokens']}"


if __name__ == "__main__":
    sys.exit(main())
