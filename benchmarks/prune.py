"""Pruning one linear beside torch: python -m benchmarks.prune [--shapes smol|7b] [--smoke]

Same weights and second moments in float32, everything from there to the pruned weights, by turns in one process.
lmmjax takes (in, out), torch (out, in). What lmmjax shares among linears with the same inputs is counted for each.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from lmmjax.calibrate.statistics import LinearStatistics
from lmmjax.errors import InputError, exit_code
from lmmjax.prune.method import Method
from lmmjax.prune.updates import UPDATES

SHAPES = {
    "smol": {"q": (576, 576), "k": (576, 192), "gate": (576, 1536), "down": (1536, 576)},
    "7b": {"q": (4096, 4096), "gate": (4096, 11008), "down": (11008, 4096)},
}
"""(in, out) of linears of a decoder layer: SmolLM2-135M's and LLaMA-7B's, each shape once."""
SMOKE = {"q": (48, 40)}
METHODS = (("wanda", None), ("sparsegpt", None), ("sparsegpt", (2, 4)), ("admm", None), ("admm", (2, 4)))
"""Names and patterns; without one, half of the weights go."""
REST_SECONDS = 0.5
"""Between two runs: torch's threads spin for a while after their work, and would slow whoever comes next."""

Pattern = tuple[int, int]


class Linear(NamedTuple):
    """A linear's weights, and the mean outer product of its inputs."""

    weight: Any
    gram: Any


class Side(NamedTuple):
    """What runs on one side, its arrays there already; `wait` returns a result once it is there, as (in, out)."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    back: Callable[[Any], np.ndarray]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before JAX looks for its devices
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measures every linear by every method, prints a line each and writes the file; returns 0."""
    shapes = SMOKE if args.smoke else SHAPES[args.shapes]
    if unknown := set(args.linears or ()) - set(shapes):
        raise InputError(f"--linears: got {', '.join(sorted(unknown))}, expected some of {', '.join(shapes)}")
    rows, load = [], os.getloadavg()[0]  # what others did on the machine when this began
    for name in args.linears or shapes:
        linear = draw(*shapes[name])
        for method, pattern in METHODS:
            rows.append({"linear": name, **measure(linear, method, pattern, 1 if args.smoke else args.rounds)})
            print(_line(rows[-1]), flush=True)
    if not args.smoke:
        device = machine.slug(jax.devices()[0].device_kind)
        print(machine.save(f"prune-{args.shapes}-{device}", {"load_average": load, "rows": rows}))
    return 0


def draw(inputs: int, outputs: int) -> Linear:
    """Returns random weights, and the moments of inputs that differ in size and have a few directions in common."""
    rng = np.random.default_rng(0)
    tokens, common = 2 * inputs, 16
    x = rng.standard_normal((tokens, inputs), np.float32)
    x += rng.standard_normal((tokens, common), np.float32) @ rng.standard_normal((common, inputs), np.float32) / 4
    x *= np.exp(rng.standard_normal(inputs, np.float32) / 2)
    gram = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST) / tokens
    return Linear(0.02 * rng.standard_normal((inputs, outputs), np.float32), np.asarray(gram))


def measure(linear: Linear, method: str, pattern: Pattern | None, rounds: int) -> dict[str, Any]:
    """Returns medians and runs of both sides, their ratio (above 1 lmmjax is faster), and how far they agree."""
    sides = {"lmmjax": ours(linear, method, pattern), "torch": theirs(linear, method, pattern)}
    first, weights, runs = {}, {}, {name: [] for name in sides}
    for name, side in sides.items():
        first[name], result = _timed(side)  # compiles, allocates, fills the caches
        weights[name] = side.back(result)
    for _ in range(rounds):
        for name, side in sides.items():
            time.sleep(REST_SECONDS)
            runs[name].append(_timed(side)[0])
    figures = {name: {"first_s": first[name], "seconds": machine.spread(runs[name])} for name in sides}
    speedup = figures["torch"]["seconds"]["median"] / figures["lmmjax"]["seconds"]["median"]
    case = {"method": method, "pattern": pattern and ":".join(map(str, pattern)), "shape": linear.weight.shape}
    return {**case, **figures, "speedup": speedup, **agreement(linear, weights["lmmjax"], weights["torch"])}


def agreement(linear: Linear, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Returns the share of weights that both kept or both dropped, how far the others are apart, and both errors.

    An error is that of the linear's output over its inputs, relative to the output.
    """
    same = (a == 0) == (b == 0)
    errors = {
        f"{name}_error": _norm(linear, linear.weight - w) / _norm(linear, linear.weight)
        for name, w in (("lmmjax", a), ("torch", b))
    }
    return {"same_mask": float(same.mean()), "difference": float(np.linalg.norm(a - b) / np.linalg.norm(b)), **errors}


def ours(linear: Linear, method: str, pattern: Pattern | None) -> Side:
    """Returns lmmjax's side, on JAX's default device."""
    weight, gram = jnp.asarray(linear.weight), jnp.asarray(linear.gram)
    drop = len(weight) // 2
    if method in UPDATES:
        update = UPDATES[method]
        return Side(
            lambda: update.choose(weight, update.prepare(gram, "here"), drop, pattern)[0],
            jax.block_until_ready,
            np.asarray,
        )
    stats, chosen = LinearStatistics(jnp.diagonal(gram)), Method(method)
    return Side(lambda: chosen.linear(weight, stats, drop).weight, jax.block_until_ready, np.asarray)


def theirs(linear: Linear, method: str, pattern: Pattern | None) -> Side:
    """Returns torch's side, on the same device.

    Raises:
        InputError: JAX's device is none that this torch has.
    """
    import torch

    from benchmarks import prune_peers_torch as peers

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise InputError(
            "torch: got one without CUDA, expected one for JAX's GPU; install it, or set JAX_PLATFORMS=cpu"
        )
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if on_gpu else "cpu"
    weight, gram = torch.tensor(linear.weight.T, device=device).contiguous(), torch.tensor(linear.gram, device=device)
    drop = len(gram) // 2

    def prune() -> Any:
        if method == "wanda":
            return peers.wanda(weight, gram.diagonal(), drop)
        return getattr(peers, method)(weight, gram, drop, pattern)

    def wait(result: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return result

    return Side(prune, wait, lambda result: result.T.cpu().numpy())


def _timed(side: Side) -> tuple[float, Any]:
    began = time.perf_counter()
    result = side.wait(side.run())
    return time.perf_counter() - began, result


def _norm(linear: Linear, weight: np.ndarray) -> float:
    return float(np.sqrt((weight * (linear.gram @ weight)).sum(dtype=np.float64)))


def _line(row: dict[str, Any]) -> str:
    inputs, outputs = row["shape"]
    medians = [f"{name} {1e3 * row[name]['seconds']['median']:.1f} ms" for name in ("lmmjax", "torch")]
    return (
        f"{row['method']} {row['pattern'] or '50%'} {inputs}x{outputs} | {' | '.join(medians)} | {row['speedup']:.2f}x"
        f" | same mask {100 * row['same_mask']:.3f}%, difference {row['difference']:.1e},"
        f" errors {row['lmmjax_error']:.4f} and {row['torch_error']:.4f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", choices=list(SHAPES), default="smol", help="default: %(default)s")
    parser.add_argument("--linears", nargs="+", metavar="NAME", help="of the shapes; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, by turns; default: 5")
    parser.add_argument("--threads", type=int, default=None, help="cores that both may use; default: all")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape once, nothing is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
