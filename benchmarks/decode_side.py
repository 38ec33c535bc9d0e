"""One model decodes alone in its process: python -m benchmarks.decode_side SIDE MODEL; for benchmarks.weights.

Prints a line of JSON: milliseconds a token of each run, the tokens, the bytes of the weights and the process's peak.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generate import Clock

PROMPT = list(range(100, 132))
"""Ids of a text prompt: what they say is of no matter, and every decoder has them."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode_side", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("model", type=Path, help="an lmmjax checkpoint, a Hugging Face directory, or a GGUF file")
    parser.add_argument("--tokens", type=int, default=64, help="written by each run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # XLA takes what it is given
    run, nbytes = SIDES[args.side](args.model, args.tokens, args.threads)
    run()  # compiles, allocates, fills the caches
    runs, ids = zip(*(run() for _ in range(args.repeats)), strict=True)
    print(json.dumps({"ms": runs, "ids": ids[0], "weights_bytes": nbytes, "peak_bytes": _peak()}))
    return 0


def _peak() -> int:
    """Returns the most memory that this process has held; `getrusage` would count that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


Side = tuple[Callable[[], tuple[float, list[int]]], int | None]
"""What runs once and gives milliseconds a token and the tokens; and the weights' bytes, where they are known."""


def lmmjax(model: Path, count: int, threads: int) -> Side:
    """Decodes a checkpoint of ours, packed or not."""
    import jax

    from lmmjax import answer, engine, runtime

    runtime.prepare()
    config, params, plan = answer.load(model)
    tokens = np.asarray([PROMPT], np.int32)

    def run() -> tuple[float, list[int]]:
        state = engine.start(config, params, tokens, np.array([len(PROMPT)]), None, max_tokens=count, plan=plan)
        jax.block_until_ready(state)
        began = time.perf_counter()
        ids = engine.answers(engine.decode(config, params, state, count))[0]
        return 1e3 * (time.perf_counter() - began) / (count - 1), ids

    return run, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def transformers(dtype: str) -> Callable[[Path, int, int], Side]:
    def side(model: Path, count: int, threads: int) -> Side:
        import torch
        from transformers import AutoModelForImageTextToText

        torch.set_num_threads(threads)
        peer: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        prompt = torch.tensor([PROMPT])
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": count}

        def run() -> tuple[float, list[int]]:
            clock = _Writing()
            with torch.inference_mode():
                mask = torch.ones_like(prompt)
                peer.generate(input_ids=prompt, attention_mask=mask, min_new_tokens=count, streamer=clock, **settings)
            # The prompt comes first, then each token: the first of these belongs to prefill.
            return 1e3 * (clock.times[-1] - clock.times[1]) / (count - 1), clock.ids

        return run, sum(weight.numel() * weight.element_size() for weight in peer.parameters())

    return side


class _Writing(Clock):
    """Notes what is written, too."""

    def __init__(self):
        super().__init__()
        self.ids: list[int] = []

    def put(self, value: Any) -> None:
        super().put(value)
        self.ids += value.flatten().tolist() if len(self.times) > 1 else []


def llama_cpp(model: Path, count: int, threads: int) -> Side:
    """Decodes a GGUF file by llama.cpp, through its Python binding."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    peer = Llama(str(model), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run() -> tuple[float, list[int]]:
        peer.reset()
        stream = peer.generate(PROMPT, temp=0.0)
        ids = [next(stream)]
        began = time.perf_counter()
        ids += [next(stream) for _ in range(count - 1)]
        return 1e3 * (time.perf_counter() - began) / (count - 1), ids

    return run, model.stat().st_size


SIDES: dict[str, Callable[[Path, int, int], Side]] = {
    "lmmjax": lmmjax,
    "transformers-float32": transformers("float32"),
    "transformers-bfloat16": transformers("bfloat16"),
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    sys.exit(main())
