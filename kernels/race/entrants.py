"""Who takes part: our op on a cache of any format, and JAX's own attention on one in bfloat16."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels import attend as op
from kernels.race.caches import Layer, Scheme, Shape, abstract, random_layer
from kernels.race.noise import normal
from kernels.race.timing import Entrant, Error
from kernels.reference import Call, Rows

DEQUANTIZE = "dequantize"
"""The way to attend that everybody has: read the whole cache as bfloat16, then JAX's attention, in one program."""
UNROLLED = 8
"""Calls in one program, at most: a launch from Python takes longer than attention over a small cache."""
MOST_SETS = 64
# Of a call's result, added to the next call's queries: so that calls run one after the other, as a model's layers do.
_TRACE = 1e-6
_QUERIES = 2**20
"""Their seed, far from those of caches."""

Corners = tuple[np.ndarray, np.ndarray]


def sets(nbytes: int, working_set: int) -> int:
    """Returns how many caches to go round, so that none is still in the device's own cache at its next turn."""
    count = min(MOST_SETS, math.ceil(working_set / nbytes))
    return count if count <= UNROLLED else -(-count // UNROLLED) * UNROLLED


def why_not(way: str, shape: Shape, scheme: Scheme | None, bits: int) -> str | None:
    """Returns why a backend of the op, or `DEQUANTIZE`, cannot run on such a cache, or None."""
    if way == DEQUANTIZE:
        return None
    layer = abstract(shape, scheme, bits)
    q: Any = jax.ShapeDtypeStruct((shape.batch, shape.heads, 1, shape.head_dim), jnp.bfloat16)
    rows, scale = Rows(layer.lengths, layer.lengths), shape.head_dim**-0.5
    return op.BACKENDS[way].unsupported(Call(q, layer.keys, layer.values, rows, None, None, True, scale))


def ours(way: str, shape: Shape, scheme: Scheme | None, bits: int, working_set: int) -> Entrant:
    """Returns a backend of the op, or `DEQUANTIZE`, on random caches; 16 bits and no scheme are exact ones."""
    nbytes = abstract(shape, scheme, bits).nbytes
    layers = [random_layer(seed, shape, scheme, bits) for seed in range(sets(nbytes, working_set))]

    def attend(q: Array, layer: Layer) -> Array:
        return op.attend(q, layer.keys, layer.values, layer.lengths, backend=way)

    def read(layer: Layer, at: Corners) -> tuple[Array, Array]:
        keys, values = jax.tree.map(lambda x: x[at], (layer.keys, layer.values))
        lengths = jnp.full(at[0].size, shape.tokens)
        return keys.read(lengths), values.read(lengths)

    # What reads a cache before it sees the queries could read those of all calls at once, and run out of memory.
    at_once = 1 if way in (DEQUANTIZE, "reference") else UNROLLED
    return _chained(dequantized if way == DEQUANTIZE else attend, read, shape, layers, at_once, nbytes)


def dequantized(q: Float[Array, "b h 1 d"], layer: Layer) -> Float[Array, "b h 1 d"]:
    """Returns attention over the cache as bfloat16, by JAX's own op."""
    stores = (layer.keys, layer.values)
    k, v = (store.read(layer.lengths).astype(q.dtype).transpose(0, 2, 1, 3) for store in stores)
    return _jax_attention("xla", q, (k, v))


def _peer(implementation: str, shape: Shape, working_set: int) -> Entrant:
    def read(layer: tuple[Array, Array], at: Corners) -> tuple[Array, Array]:
        k, v = (side[at[0], :, at[1]] for side in layer)
        return k, v

    layers = _bfloat16_layers(shape, sets(shape.nbytes, working_set))
    return _chained(functools.partial(_jax_attention, implementation), read, shape, layers, UNROLLED, shape.nbytes)


PEERS: dict[str, Callable[[Shape, int], Entrant]] = {
    "jax-xla": functools.partial(_peer, "xla"),
    "jax-cudnn": functools.partial(_peer, "cudnn"),
}
"""Made for a shape and a working set in bytes; where one does not run, making it raises what it raises."""


def release() -> None:
    """Lets go of the peers' buffers."""
    _bfloat16_layers.cache_clear()


def corners(batch: int, kv_heads: int) -> Corners:
    """Returns the rows and kv heads on which results are checked, as an index: the first and the last of each."""
    return np.array([[0], [batch - 1]]), np.array([[0, kv_heads - 1]])


def relative_error(
    out: Float[np.ndarray, "r k g d"],
    q: Float[np.ndarray, "r k g d"],
    k: Float[np.ndarray, "r k s d"],
    v: Float[np.ndarray, "r k s d"],
) -> Error:
    """Returns how far g queries a kv head are from exact attention, in float64."""
    out, q, k, v = (np.asarray(x, np.float64) for x in (out, q, k, v))
    scores = np.einsum("rkgd,rksd->rkgs", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("rkgs,rksd->rkgd", weights / weights.sum(-1, keepdims=True), v)
    return Error.of(out, exact)


def _chained(
    call: Callable[[Array, Any], Array],
    read: Callable[[Any, Corners], tuple[Array, Array]],
    shape: Shape,
    layers: Sequence[Any],
    at_once: int,
    nbytes: int,
) -> Entrant:
    """Returns an entrant that calls on one layer after the other; its error is that of the very program it times.

    `read` gives a layer's keys and values at the corners.
    """

    @jax.jit
    def program(q: Array, batch: Sequence[Any]) -> tuple[Array, Array]:
        out = q
        for layer in batch:
            out = call(q, layer)
            q = q + jnp.asarray(_TRACE, q.dtype) * out
        return q, out

    @jax.jit
    def checked(out: Array, q: Array, layer: Any) -> tuple[Array, ...]:
        at = corners(shape.batch, shape.kv_heads)
        grouped = (x.reshape(shape.batch, shape.kv_heads, -1, shape.head_dim)[at] for x in (out, q))
        return tuple(x.astype(jnp.float32) for x in (*grouped, *read(layer, at)))

    size = min(at_once, len(layers))
    batches = [tuple(layers[i : i + size]) for i in range(0, len(layers), size)]
    q = normal(_QUERIES, (shape.batch, shape.heads, 1, shape.head_dim))
    _, out = program(q, batches[0])
    error = relative_error(*map(np.asarray, checked(out, q, batches[0][-1])))
    turns, held = itertools.cycle(batches), [q]

    def run() -> Array:
        held[0], last = program(held[0], next(turns))
        return last

    return Entrant(run, jax.block_until_ready, size, nbytes, error)


def _jax_attention(implementation: Any, q: Array, layer: tuple[Array, Array]) -> Array:
    """Returns attention of q (b, h, 1, d) over keys and values as JAX wants them, (b, s, k, d)."""
    out = jax.nn.dot_product_attention(q.transpose(0, 2, 1, 3), *layer, implementation=implementation)
    return out.transpose(0, 2, 1, 3)


@functools.lru_cache(1)
def _bfloat16_layers(shape: Shape, count: int) -> list[tuple[Array, Array]]:
    b, k, s, d = shape.side
    draw = jax.jit(normal, static_argnums=1)
    return [(draw(2 * seed, (b, s, k, d)), draw(2 * seed + 1, (b, s, k, d))) for seed in range(count)]
