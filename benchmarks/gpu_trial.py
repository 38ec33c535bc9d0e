"""A trial of the search at LLaVA-1.5's size on a GPU: python -m benchmarks.gpu_trial [--tokens 32000]

Weights, images and the order in which weights go are random; an image and a question a sample. A trial prunes, rounds
keys and values, predicts all answers and compares them with the dense model's. Trials differ in every layer's sparsity
and widths, and what they compile is counted: one program each serves them all.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.gpu_cases import MODELS, QUESTION
from benchmarks.gpu_model import random_params
from kernels.race import noise
from lmmjax.config import LINEARS, LlavaConfig, from_hf
from lmmjax.data import Encoded
from lmmjax.errors import exit_code
from lmmjax.files import write_atomic
from lmmjax.linears import kernels_of
from lmmjax.plan import BITS, CacheFormat
from lmmjax.prune.transform import Ranks
from search import objective
from search.objective import Evaluator
from search.space import Candidate

ANSWER = 2


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Times the trials one by one, prints them and writes the file; returns 0."""
    config = from_hf(MODELS[args.model])
    params, began = random_params(config, "bf16"), time.monotonic()
    samples = random_samples(config, args.tokens)
    evaluate = Evaluator(config, params, random_ranks(config, params), CacheFormat(), samples, batch=args.batch)
    prepared, rng = time.monotonic() - began, np.random.default_rng(0)
    compiled, taken = _compiled(), []
    for _ in range(args.trials + 1):
        candidate, began = random_candidate(config, rng), time.monotonic()
        evaluate(candidate)
        taken.append(time.monotonic() - began)
    figures = {
        "tokens": int(samples.lengths.sum()),
        "prepared_s": prepared,
        "first_s": taken[0],
        "trial_s": machine.spread(taken[1:]),
        "compiled_again": _compiled() - compiled,
    }
    found = {"about": machine.facts(), "model": args.model, **figures}
    print(", ".join(f"{name} {value}" for name, value in figures.items()))
    if args.out:
        write_atomic(Path(args.out), json.dumps(found, indent=1) + "\n")
    return 0


def random_samples(config: LlavaConfig, tokens: int) -> Encoded:
    """Returns so many tokens, at least one sample: an image, a question, and an answer of a few tokens."""
    each, vision = config.image_tokens + QUESTION, config.vision
    assert vision is not None
    count, rng = max(1, tokens // each), np.random.default_rng(0)
    text = rng.integers(3, 20, (count, QUESTION))
    ids = np.concatenate([np.full((count, config.image_tokens), config.image_token), text], axis=1).astype(np.int32)
    answer = np.broadcast_to(np.arange(each) >= each - ANSWER, ids.shape)
    shape = (count, vision.channels, vision.image_size, vision.image_size)
    pixels = rng.standard_normal(shape, np.float32)
    return Encoded(ids, np.full(count, each), answer, pixels, ("random",) * count)


def random_ranks(config: LlavaConfig, params: Any) -> Ranks:
    """Returns a place within its output for every prunable weight, as ranks of scores are kept."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(seed: Any, shape: tuple[int, ...]) -> jax.Array:
        return (noise.bits(seed, shape) % jnp.uint32(shape[0])).astype(jnp.uint16)

    return tuple(
        {
            name: draw(len(LINEARS) * i + j, kernel.shape)
            for j, (name, kernel) in enumerate(kernels_of(params["text"][f"layers_{i}"]).items())
        }
        for i in range(config.text.layers)
    )


def random_candidate(config: LlavaConfig, rng: np.random.Generator) -> Candidate:
    """Returns sparsities around a half, and any widths."""
    inputs = np.array([config.text.linear_shape(name)[0] for name in LINEARS])
    drops = (inputs * rng.uniform(0.3, 0.7, (config.text.layers, 1))).astype(np.int32)
    widths = (rng.choice(BITS, config.text.layers).astype(np.int32) for _ in range(2))
    return Candidate(drops, *widths)


def _compiled() -> int:
    """Returns how many programs the search's two functions have been compiled to."""
    programs: Any = (objective.pruned, objective._predict)
    return sum(program._cache_size() for program in programs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_trial", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="7b", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32000, help="of all samples; default: %(default)s")
    parser.add_argument("--batch", type=int, default=10, help="samples at once; default: %(default)s")
    parser.add_argument("--trials", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--out", help="a file; default: none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
