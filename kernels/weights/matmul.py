"""The public op: rows of activations times a matrix in any format. Contract, validation and choice of backend."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import backends
from kernels.backends import Backend
from kernels.weights.formats import Matrix

_choices: contextvars.ContextVar[list[str]] = contextvars.ContextVar("weight choices")


def unpacked(x: Float[Array, "m k"], matrix: Matrix) -> Float[Array, "m r"]:
    """Returns x @ matrix by way of the dense matrix: what the op means."""
    product = jnp.dot(x.astype(jnp.float32), matrix.rows().T, precision="highest")
    return product.astype(x.dtype)


BACKENDS: dict[str, Backend] = {
    "unpacked": Backend(unpacked, lambda *_: None),
}
"""In order of preference: without a choice, the first that has no reason against it runs."""


def matmul(x: Float[Array, "*batch k"], matrix: Matrix, backend: str | None = None) -> Float[Array, "*batch r"]:
    """Returns x @ matrix in x's dtype, each product's sum in float32. Activations are not rounded.

    Args:
        x: activations.
        matrix: weights in any format; codes are taken times their scales in float32.
        backend: a name in `BACKENDS`. An explicit choice never falls back.

    Raises:
        ValueError: shapes do not fit, or the chosen backend cannot serve this call (says why).
    """
    if x.shape[-1] != matrix.inputs:
        raise ValueError(f"x: got shape {x.shape}, expected {matrix.inputs} on the last axis")
    rows = x.reshape(-1, matrix.inputs)
    chosen = backends.choose(backend, BACKENDS, "multiply by this matrix", rows, matrix)
    _choices.get([]).append(f"{chosen} ({matrix.kind}, {matrix.bits} bits)")
    return BACKENDS[chosen].run(rows, matrix).reshape(*x.shape[:-1], matrix.outputs)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Yields a list to which every `matmul` that is traced inside adds its backend and format."""
    token = _choices.set([])
    try:
        yield _choices.get()
    finally:
        _choices.reset(token)
