"""Whole models of LLaVA-1.5's size on a GPU: python -m benchmarks.gpu_model [--cases BxS:BITS:WEIGHTS ...]

Weights and caches are random and made on the device. A decode step's time is that of the last tokens of a context, all
of them in one program, as `lmmjax.generate` runs it; its floor is what must be read, over the bandwidth of a copy. All
programs compile side by side before the first is timed; every figure is on disk before the next is taken.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.gpu_cases import MODELS, NEW, QUESTION, Case
from benchmarks.gpu_profile import profiled
from benchmarks.weights_gpu import random_matrix
from kernels.gpu.weights import cases as weights
from kernels.race import noise, timing
from kernels.race.caches import bytes_read, randomized
from lmmjax import engine, llava
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.engine import State
from lmmjax.errors import exit_code, first_line
from lmmjax.files import write_atomic
from lmmjax.joined import join_linears
from lmmjax.linears import kernels_of, with_kernels
from lmmjax.llava import Params
from lmmjax.plan import Plan, uniform
from lmmjax.sample import GREEDY

WEIGHTS = {"bf16": None, **weights.FORMATS}
"""Formats of the decoder's prunable linears; all else is bfloat16."""
COPIED = 2**31
ROUNDS = 3

Program = Callable[..., Any]
Building = Future[tuple[Program, float]]
"""A program and the seconds that it took to compile, in the making."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures the prompt and all cases, a line each, and writes the file; returns 0."""
    config = _config(args.model, args.layers)
    small, began = args.model == "smoke", time.monotonic()
    copy = timing.copy_bandwidth(2**20 if small else COPIED, 3 if small else 15, 0.0 if small else 0.005)
    name = machine.slug(jax.devices()[0].device_kind)
    out = Path(args.out or f"runs/bench/model-{args.model}-{name}.json")
    found: dict[str, Any] = {"about": machine.facts(), "model": args.model, "copy_gbps": copy / 1e9, "cases": {}}

    def keep(key: str, figures: Mapping[str, Any], of: dict[str, Any]) -> None:
        of[key] = figures
        print(f"{key}: {_line(figures)}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, json.dumps(found, indent=1) + "\n")

    with ThreadPoolExecutor(args.compilers) as pool:
        programs = {case: decoding(pool, config, case, args.new) for case in args.cases}
        prompts = reading(pool, config) if args.prompt else ()
    # Behind the pool: nothing is timed while others compile.
    print(f"{len(programs)} decode programs are compiled after {time.monotonic() - began:.0f} s", flush=True)
    forms: list[str] = [*(["bf16"] if prompts else []), *(case.weights for case in args.cases)]
    for form in dict.fromkeys(forms):
        params = running_params(config, form)
        if form == "bf16" and prompts:
            keep("prompt", _attempt(lambda: prompt(config, params, prompts, args)), found)  # noqa: B023
        for case in (case for case in args.cases if case.weights == form):
            keep(case.name, _attempt(lambda: decode(config, params, case, programs[case], args, copy)), found["cases"])  # noqa: B023
        del params
    return 0


def _config(model: str, layers: int | None) -> LlavaConfig:
    raw = MODELS[model]
    text = raw["text_config"]
    return from_hf(raw | {"text_config": text | {"num_hidden_layers": layers or text["num_hidden_layers"]}})


def decoding(pool: ThreadPoolExecutor, config: LlavaConfig, case: Case, new: int) -> Building:
    """Returns the decode program of a case, in the making."""
    params = jax.eval_shape(functools.partial(running_params, config, case.weights))
    return pool.submit(
        _built, engine.decode.lower(config, params, abstract_state(config, params, case, new), _steps(0))
    )


def reading(pool: ThreadPoolExecutor, config: LlavaConfig) -> tuple[Building, Building]:
    """Returns the programs of the tower with projector, and of a prompt of one image and a question, in the making."""
    params, shape = jax.eval_shape(functools.partial(running_params, config, "bf16")), jax.ShapeDtypeStruct
    vision = config.vision
    assert vision is not None
    pixels = shape((1, vision.channels, vision.image_size, vision.image_size), jnp.bfloat16)
    images = shape((1, config.image_tokens, config.text.width), jnp.bfloat16)
    case = _asked(config)
    tokens, lengths = shape((1, case.context - NEW), jnp.int32), shape((1,), jnp.int32)
    state = abstract_state(config, params, case, NEW)
    return (
        pool.submit(_built, engine.encode_images.lower(config, params, pixels)),
        pool.submit(_built, engine.prefill.lower(config, params, state, tokens, lengths, images)),
    )


def _asked(config: LlavaConfig) -> Case:
    return Case(1, config.image_tokens + QUESTION + NEW)


def _built(lowered: Any) -> tuple[Program, float]:
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def _steps(count: int) -> jax.Array:
    return jnp.asarray(count, jnp.int32)


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # nobody else need stop for it
        return {"failed": first_line(error)}


def decode(
    config: LlavaConfig, params: Params, case: Case, building: Building, args: argparse.Namespace, copy: float
) -> dict[str, Any]:
    """Returns a decode step's milliseconds beside its floor."""
    program, seconds = building.result()
    state, taken = random_state(config, params, case, args.new), []
    steps = _steps(args.new - 1)
    nbytes = decoder_bytes(params) + sum(bytes_read(store) for layer in state.cache.layers for store in layer)
    for _ in range(args.rounds + 1):
        state = jax.block_until_ready(rewound(state, case.context - args.new))
        began = time.perf_counter()
        state = jax.block_until_ready(program(params, state, steps))
        taken.append(1e3 * (time.perf_counter() - began) / (args.new - 1))
    assert int(state.counts[0]) == args.new, "all steps were taken"
    ms = statistics.median(taken[1:])
    figures = {"ms": ms, "runs": taken, "tokens_per_s": 1e3 * case.batch / ms, "bytes": nbytes}
    figures |= {
        "floor_ms": 1e3 * nbytes / copy,
        "of_floor": 1e3 * nbytes / copy / ms,
        "compile_s": seconds,
        **_memory(),
    }
    if case.name in args.profile:
        figures["profile"] = profiled(
            lambda: jax.block_until_ready(program(params, rewound(state, case.context - args.new), _steps(4))), 4
        )
    return figures


def prompt(
    config: LlavaConfig, params: Params, programs: Sequence[Building], args: argparse.Namespace
) -> dict[str, Any]:
    """Returns milliseconds of the tower with projector, and of the prefill of one image and a question."""
    see, read = (building.result()[0] for building in programs)
    vision, case = config.vision, _asked(config)
    assert vision is not None
    pixels = noise.normal(1, (1, vision.channels, vision.image_size, vision.image_size))
    images = see(params, pixels)
    tokens = np.concatenate([np.full(config.image_tokens, config.image_token), np.arange(QUESTION) % 20 + 3])
    row, length = jnp.asarray(tokens[None], jnp.int32), jnp.asarray([tokens.size], jnp.int32)

    def fresh() -> State:
        return jax.block_until_ready(_state(config, engine.new_cache(config, params, *_room(config, case)), case, NEW))

    figures: dict[str, Any] = {
        "tokens": int(tokens.size),
        "vision_ms": _median_ms(lambda _: see(params, pixels), lambda: None, args.rounds + 3),
        "prefill_ms": _median_ms(lambda state: read(params, state, row, length, images), fresh, args.rounds + 3),
    }
    if "prompt" in args.profile:
        state = fresh()
        figures["profile"] = profiled(lambda: jax.block_until_ready(read(params, state, row, length, images)), 1)
    return figures


def random_params(config: LlavaConfig, form: str) -> Params:
    """Returns random weights, the decoder's linears in a format of `WEIGHTS`."""
    shapes = llava.shapes(config, "bfloat16")
    text = shapes["text"]
    for i in range(config.text.layers):
        layer = text[f"layers_{i}"]
        text = text | {f"layers_{i}": with_kernels(layer, _kernels(layer, form, i))}
    leaves, tree = jax.tree.flatten_with_path(shapes | {"text": text})
    return jax.tree.unflatten(tree, [_leaf(path, leaf, seed) for seed, (path, leaf) in enumerate(leaves)])


def running_params(config: LlavaConfig, form: str) -> Params:
    """Returns random weights, joined as in any model that runs."""
    return join_linears(config.text, random_params(config, form))


def _kernels(layer: Params, form: str, index: int) -> dict[str, Any]:
    case = WEIGHTS[form]
    if case is None:
        return {}
    shapes = {name: (kernel.shape[0], kernel.shape[1]) for name, kernel in kernels_of(layer).items()}
    return {
        name: random_matrix(16 * index + i, dataclasses.replace(case, shape=shape))
        for i, (name, shape) in enumerate(shapes.items())
    }


def _leaf(path: Any, leaf: Any, seed: int) -> jax.Array:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if path[-1].key == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    return _normal(seed, leaf.shape)


@functools.partial(jax.jit, static_argnums=1)
def _normal(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(0.02, jnp.bfloat16) * noise.normal(seed, shape)


def abstract_state(config: LlavaConfig, params: Params, case: Case, new: int) -> State:
    """Returns the state of a case as shapes without numbers."""
    return jax.eval_shape(lambda: _state(config, engine.new_cache(config, params, *_room(config, case)), case, new))


def random_state(config: LlavaConfig, params: Params, case: Case, new: int) -> State:
    """Returns a state whose cache is full of random tokens."""
    cache = abstract_state(config, params, case, new).cache
    stores: Any = cache.layers[0]
    fill = jax.jit(lambda seed: tuple(randomized(store, 2 * seed + i) for i, store in enumerate(stores)))
    layers = tuple(fill(seed) for seed in range(len(cache.layers)))
    return _state(config, cache.replace(layers=layers, lengths=jnp.zeros(case.batch, jnp.int32)), case, new)


def rewound(state: State, length: int) -> State:
    """Returns the state as it is behind a prompt of this length, with a first token written."""
    batch = state.counts.shape[0]
    cache = state.cache.replace(lengths=jnp.full(batch, length, jnp.int32))
    return state.replace(cache=cache, counts=jnp.ones(batch, jnp.int32), done=jnp.zeros(batch, bool))


def decoder_bytes(params: Params) -> int:
    """Returns the bytes of all weights that a decode step reads: the decoder's, but for the table of embeddings."""
    text = {name: part for name, part in params["text"].items() if name != "embedding"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(text))


def _state(config: LlavaConfig, cache: Any, case: Case, new: int) -> State:
    return State(
        cache=cache,
        answer=jnp.zeros((case.batch, cache.capacity), jnp.int32),
        counts=jnp.ones(case.batch, jnp.int32),
        limits=jnp.full(case.batch, new, jnp.int32),
        done=jnp.zeros(case.batch, bool),
        keys=jax.random.split(jax.random.key(0), case.batch),
        sampling=GREEDY.typed(),
        eos=jnp.zeros(0, jnp.int32),
    )


def _room(config: LlavaConfig, case: Case) -> tuple[Plan | None, int, int]:
    plan = uniform(config.text, bits=case.bits) if case.bits < 16 else None
    return plan, case.batch, case.context


def _memory() -> dict[str, float]:
    """Returns the most gigabytes that were in use so far; nothing where the device does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {}


def _median_ms(run: Callable[[Any], Any], prepare: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        prepared = prepare()
        began = time.perf_counter()
        jax.block_until_ready(run(prepared))
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken[1:])


def _line(figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return figures["failed"]
    if "ms" not in figures:
        return ", ".join(f"{name} {value}" for name, value in figures.items())
    return (
        f"{figures['ms']:.3f} ms a step, {figures['tokens_per_s']:.0f} tokens/s, {figures['of_floor']:.2f} of the floor"
        f" {figures['floor_ms']:.3f} ms; compiled in {figures['compile_s']:.0f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="7b", help="default: %(default)s")
    parser.add_argument("--cases", nargs="*", type=Case.parse, default=[], metavar="BxS:BITS:WEIGHTS")
    parser.add_argument("--prompt", action="store_true", help="time tower and prefill of one image, too")
    parser.add_argument("--profile", nargs="*", default=[], metavar="NAME", help="cases whose step is looked into")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="answers of each case; default: %(default)s")
    parser.add_argument("--compilers", type=int, default=8, help="programs compiled at once; default: %(default)s")
    parser.add_argument("--layers", type=int, help="of the decoder; default: the model's")
    parser.add_argument("--out", help="default: runs/bench/model-MODEL-DEVICE.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
