"""Products with weight matrices on a GPU beside torch's: python -m benchmarks.weights_gpu [--smoke]

Decode shapes of LLaVA-1.5's linears. All formats and peers of a shape run by turns in one process, each over as many
random matrices as do not fit the device's own cache; every figure is on disk before the next shape.
"""

import argparse
import contextlib
import contextvars
import dataclasses
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import machine
from kernels.gpu import device
from kernels.gpu.weights import matmul
from kernels.gpu.weights.cases import CHECKED, FORMATS, LAYERS, Case
from kernels.gpu.weights.layout import Arranged, Pairs
from kernels.race import noise, timing
from kernels.race.entrants import sets
from kernels.race.standings import WRONG, figures
from kernels.race.timing import Entrant, Error
from lmmjax.errors import InputError, exit_code, first_line

TORCH = "benchmarks.weights_peers_torch"
PEER = "torch linear"
"""Whose times ours are compared with: bfloat16."""
FLOORS = {"int8": 1.7, "int4 g128": 2.6, "2:4": 1.45, "2:4 int8": 2.3}
"""How many times as fast as the peer a layer's products should be with up to 8 rows."""
TURNS = 7
"""How often a program goes round its matrices once more: a launch from Python takes longer than a small product."""
_TWO_OF_FOUR = (3, 5, 6, 9, 10, 12)


class Size(NamedTuple):
    """How much is measured; as in `kernels.race.jobs`, with linears as (inputs, outputs, number of them) by model."""

    layers: Mapping[str, Mapping[str, tuple[int, int, int]]]
    working_set: int
    copied: int
    rounds: int
    seconds: float


FULL = Size(LAYERS, 2**28, 2**31, 15, 0.005)
SMOKE = Size({"tiny": {"q": (256, 64, 1)}}, 2**10, 2**12, 2, 0.0)


class Job(NamedTuple):
    """One shape of one model, met by so many rows."""

    model: str
    linear: str
    shape: tuple[int, int]
    count: int
    m: int


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Else JAX takes most of the memory at once, and leaves torch too little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures every shape, prints a line each and then whole layers, and writes the file; returns 0."""
    size = SMOKE if args.smoke else FULL
    if device.current() is None and not args.smoke:
        raise InputError("device: got none with CUDA, expected one; --smoke interprets tiny shapes on a CPU")
    peers, name = _peers(args.torch), machine.slug(jax.devices()[0].device_kind)
    with device.speaking_of(device.EMULATED) if device.current() is None else contextlib.nullcontext():
        copy = timing.copy_bandwidth(size.copied, size.rounds, size.seconds)
        print(f"{name}: copies {copy / 1e9:.0f} GB/s, read and written", flush=True)
        rows: list[dict[str, Any]] = []
        for job in _jobs(size, args):
            rows.append({**job._asdict(), "entrants": hold(job, args.formats, peers, size, copy)})
            print(_line(rows[-1]), flush=True)
            if not args.smoke:
                machine.save(f"weights-{name}", {"copy_gbps": copy / 1e9, "rows": rows})
    print("\n".join(layers(rows)))
    return 0


def hold(job: Job, formats: Sequence[str], peers: Mapping[str, Any], size: Size, copy: float) -> dict[str, Any]:
    """Returns the figures of all that run a job, by turns, and the reason of each that does not."""
    made = {name: _attempt(functools.partial(make, job.shape, job.m, size.working_set)) for name, make in peers.items()}
    cases = {name: dataclasses.replace(FORMATS[name], shape=job.shape, m=job.m) for name in formats}
    made |= _made({name: functools.partial(ours, case, size.working_set) for name, case in cases.items()})
    able = {name: one for name, one in made.items() if not isinstance(one, str)}
    taken = timing.race(able, size.rounds, size.seconds)
    found = {name: figures(taken[name], one, copy) for name, one in able.items()}
    return found | {name: {"failed": one} for name, one in made.items() if isinstance(one, str)}


def _made(makers: Mapping[str, Callable[[], Entrant]]) -> dict[str, Entrant | str]:
    """Returns all that can run, or why not. Programs compile side by side: nothing is timed yet."""
    with ThreadPoolExecutor() as pool:
        making = {name: pool.submit(contextvars.copy_context().run, _attempt, make) for name, make in makers.items()}
    return {name: one.result() for name, one in making.items()}


def ours(case: Case, working_set: int) -> Entrant:
    """Returns the kernel on random matrices; raises ValueError where it cannot run."""
    matrices = [random_matrix(seed, case) for seed in range(sets(case.abstract().nbytes, working_set))]
    x = noise.normal(2**20, (case.m, case.shape[0]))
    if reason := matmul.unsupported(x, matrices[0]):
        raise ValueError(reason)
    exact = np.asarray(x, np.float64) @ np.asarray(jax.jit(_first_rows)(matrices[0]), np.float64).T
    return chained(matmul.run, x, matrices, exact, matrices[0].nbytes)


def plain(shape: tuple[int, int], m: int, working_set: int) -> Entrant:
    """Returns XLA's product with bfloat16 matrices."""
    nbytes = 2 * shape[0] * shape[1]
    draw = jax.jit(noise.normal, static_argnums=1)
    matrices = [draw(seed, shape) for seed in range(sets(nbytes, working_set))]
    x = noise.normal(2**20, (m, shape[0]))
    exact = np.asarray(x, np.float64) @ np.asarray(matrices[0][:, :CHECKED], np.float64)
    return chained(jnp.matmul, x, matrices, exact, nbytes)


def chained(
    product: Callable[[Array, Any], Array], x: Array, matrices: Sequence[Any], exact: np.ndarray, nbytes: int
) -> Entrant:
    """Returns an entrant that multiplies by one matrix after the other, again and again, in one program."""

    @jax.jit
    def program(x: Array, matrices: Sequence[Any]) -> tuple[Array, list[Array]]:
        return jax.lax.fori_loop(0, TURNS, lambda _, last: turn(last[0], matrices), turn(x, matrices))

    def turn(x: Array, matrices: Sequence[Any]) -> tuple[Array, list[Array]]:
        outs = []
        for matrix in matrices:
            # So that products run one after the other, as a model's do, and x is made ready for each. Nothing is added
            # to x to this end: that would be a launch more, as long as a small product.
            x, out = jax.lax.optimization_barrier((x, product(x, matrix)))
            outs.append(out)
        return x, outs

    error = Error.of(np.asarray(program(x, matrices)[1][0][:, :CHECKED], np.float64), exact)
    return Entrant(lambda: program(x, matrices), jax.block_until_ready, (1 + TURNS) * len(matrices), nbytes, error)


@functools.partial(jax.jit, static_argnames="case")
def random_matrix(seed: Array | int, case: Case) -> Arranged:
    """Returns a matrix of random weights as the kernel reads it: made on the device, all codes equally likely."""
    like = case.abstract()
    words = noise.bits(4 * seed, like.values.shape).astype(jnp.uint16)
    values = noise.normal(4 * seed, like.values.shape)
    if like.scales is not None:
        values = jax.lax.bitcast_convert_type(words, jnp.int16)
        like = like.replace(scales=noise.uniform(4 * seed + 1, like.scales.shape, 5e-4, 1e-3).astype(jnp.bfloat16))
    if isinstance(like, Pairs):
        which = noise.bits(4 * seed + 2, (*like.mask.shape, 4)) % len(_TWO_OF_FOUR)
        bits = jnp.asarray(_TWO_OF_FOUR, jnp.uint16)[which] << jnp.arange(0, 16, 4, dtype=jnp.uint16)
        mask = jnp.sum(bits, axis=-1, dtype=jnp.uint16)
        like = like.replace(mask=jax.lax.bitcast_convert_type(mask, jnp.int16))
    return like.replace(values=values)


def layers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each model and number of rows: how many times as fast as the peer a layer's products are."""
    lines = []
    for key, group in itertools.groupby(sorted(rows, key=_whole), key=_whole):
        own, total = list(group), {}
        for name in dict.fromkeys(name for row in own for name in row["entrants"]):
            times = [row["count"] * row["entrants"].get(name, {}).get("us", float("nan")) for row in own]
            total[name] = sum(times)
        total = {name: us for name, us in total.items() if not np.isnan(us)}
        cells = [_cell(name, total[PEER] / us, key[1]) for name, us in total.items() if PEER in total]
        lines.append(f"{key[0]}, {key[1]} rows, a layer: " + ", ".join(cells))
    return lines


def _whole(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["model"], row["m"]


def _cell(name: str, times: float, m: int) -> str:
    asked = FLOORS.get(name) if m <= 8 else None
    verdict = "" if asked is None else f" ({'met' if times >= asked else 'MISSED'}: {asked}x)"
    return f"{name} {times:.2f}x{verdict}"


def _first_rows(matrix: Arranged) -> Float[Array, "r k"]:
    return matrix.rows()[:CHECKED]


def _attempt(make: Callable[[], Entrant]) -> Entrant | str:
    """Returns an entrant that runs and is right, or what is wrong with it: nobody else need stop for it."""
    try:
        made = make()
    except Exception as error:
        return first_line(error)
    return made if made.error.whole <= WRONG else f"wrong result: relative error {made.error.whole:.2g}"


def _peers(torch: bool) -> dict[str, Callable[..., Entrant]]:
    if not torch:
        return {"jax": plain}
    try:
        others = importlib.import_module(TORCH).PEERS
    except ImportError as error:
        print(f"without torch: {first_line(error)}", file=sys.stderr)
        others = {}
    return {**others, "jax": plain}


def _jobs(size: Size, args: argparse.Namespace) -> list[Job]:
    models = [model for model in size.layers if args.models is None or model in args.models]
    return [
        Job(model, linear, (inputs, outputs), count, m)
        for model in models
        for m in args.rows
        for linear, (inputs, outputs, count) in size.layers[model].items()
    ]


def _line(row: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {one['us']:.4g} us ({one['of_copy']:.2f})" if "us" in one else f"{name}: {one['failed']}"
        for name, one in row["entrants"].items()
    ]
    return f"{row['model']} {row['linear']} {'x'.join(map(str, row['shape']))}, {row['m']} rows | " + ", ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights_gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 4, 16], help="of x; default: 1 8 4 16")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="default: all")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="without its kernels")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, interpreted without a GPU; writes nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
