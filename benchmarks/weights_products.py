"""One row times a matrix, in every format, beside XLA and torch: milliseconds, bytes a second, by turns."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from benchmarks.machine import spread

SHAPES = {
    "smol, gate": (576, 1536),
    "smol, down": (1536, 576),
    "smol, head": (576, 49152),
    "7B, gate": (4096, 11008),
}
"""Inputs and outputs."""
COPIES = 3
"""Of every matrix, taken by turns: the large ones come from memory; of the two small ones a cache may hold all."""
FORMATS = [
    ("dense", 16),
    ("dense", 8),
    ("dense", 4),
    ("bitmap", 16),
    ("bitmap", 8),
    ("bitmap", 4),
    ("2:4", 16),
    ("2:4", 8),
]
Product = Callable[[], Any]


def measure(repeats: int, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Returns the bandwidth of plain reading, and {shape: {side: figures}}."""
    stream = _stream()
    figures = {}
    for name, (inputs, outputs) in shapes.items():
        sides = dict(_sides(inputs, outputs))
        runs: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, (product, _) in sides.items():
                product()  # its threads awake
                began = time.perf_counter()
                for _ in range(COPIES):
                    product()
                runs[side].append(1e3 * (time.perf_counter() - began) / COPIES)
        figures[name] = {side: _figures(runs[side], sides[side][1], stream) for side in sides}
    return {"stream_bytes_per_s": stream, "shapes": figures}


def _figures(runs: list[float], nbytes: int, stream: float) -> dict[str, Any]:
    times = spread(runs)
    rate = 1e3 * nbytes / times["median"]
    return {"ms": times, "bytes": nbytes, "bytes_per_s": rate, "of_stream": rate / stream}


def _stream() -> float:
    """Returns the bytes a second at which torch sums 512 MB of float32 with all its threads: reading and no more."""
    import torch

    data = torch.ones(128 * 2**20)
    data.sum()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.numel() * 4 / min(times)


def _sides(inputs: int, outputs: int) -> Iterator[tuple[str, tuple[Product, int]]]:
    """Yields each side's product, and the bytes of its matrix."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((inputs, outputs)).astype(np.float32)
    x = rng.standard_normal((1, inputs)).astype(np.float32)
    yield from _torch(x, kernel)
    yield from _ours(x, kernel)


def _ours(x: np.ndarray, kernel: np.ndarray) -> Iterator[tuple[str, tuple[Product, int]]]:
    import jax

    from kernels.weights import WeightFormat, encode

    compiled = jax.jit(lambda x, w: x @ w)
    multiply = lambda x, w: compiled(x, w).block_until_ready()  # noqa: E731
    rows = jax.numpy.asarray(x)
    plain = [jax.device_put(kernel.copy()) for _ in range(COPIES)]
    yield "XLA, float32", (_turns(multiply, rows, plain), kernel.nbytes)
    for kind, bits in FORMATS:
        values = (kernel * _kept(kernel, kind)).astype(bfloat16 if bits == 16 else np.float32)
        packed = encode(values, WeightFormat(kind, bits, 64 if bits == 4 else None))
        copies = [jax.tree.map(lambda leaf: jax.device_put(leaf.copy()), packed) for _ in range(COPIES)]
        yield f"{kind}, {bits} bits", (_turns(multiply, rows, copies), packed.nbytes)


def _turns(product: Callable, x: Any, copies: list[Any]) -> Product:
    """Returns what multiplies by the next copy at each call."""
    turns = itertools.cycle(copies)
    return lambda: product(x, next(turns))


def _kept(kernel: np.ndarray, kind: str) -> np.ndarray | float:
    """Returns which half is kept: the larger weights of an output, or of each four."""
    if kind == "dense":
        return 1.0
    size = np.abs(kernel).reshape(-1, 4 if kind == "2:4" else len(kernel), kernel.shape[1])
    ranks = size.argsort(1).argsort(1)  # not a threshold, which equal weights would share
    return (ranks >= size.shape[1] // 2).reshape(kernel.shape)


def _torch(x: np.ndarray, kernel: np.ndarray) -> Iterator[tuple[str, tuple[Product, int]]]:
    import torch

    weight, row = torch.from_numpy(kernel.T.copy()), torch.from_numpy(x)
    linear = torch.nn.functional.linear
    for dtype in (torch.float32, torch.bfloat16):
        copies = [weight.to(dtype).clone() for _ in range(COPIES)]
        name = str(dtype).removeprefix("torch.")
        yield f"torch, {name}", (_turns(linear, row.to(dtype), copies), weight.numel() * dtype.itemsize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says it will drop it, and has no other product of int8 on CPUs
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, zeros, 0, torch.qint8)
        packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(COPIES)]
    yield "torch, int8", (_turns(torch.ops.quantized.linear_dynamic, row, packed), weight.numel())
