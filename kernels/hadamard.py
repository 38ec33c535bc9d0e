"""Orthogonal rotation by a Hadamard matrix: spreads a channel's outliers over all channels, and changes no product.

head_dim = 2^m * r: a fast transform over the power of two, and an orthogonal r x r factor for an odd r > 1, by a
Kronecker product. The matrix is symmetric, so the transform undoes itself.
Source: QuaRot, arXiv:2404.00456, section 3; the odd factor is ours.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotate(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Returns x H along the last axis, in float32, for any d; O(d log d) for a power of two."""
    dim = x.shape[-1]
    odd = _odd_part(dim)
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], odd, dim // odd)
    span = 1
    while span < dim // odd:
        pairs = y.reshape(*x.shape[:-1], odd, -1, 2, span)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([low + high, low - high], axis=-2)
        span *= 2
    y = y.reshape(*x.shape[:-1], odd, -1) * (dim // odd) ** -0.5
    if odd > 1:
        y = jnp.einsum("...od,op->...pd", y, _reflection(odd), precision="highest")
    return y.reshape(x.shape)


def matrix(dim: int) -> Float[np.ndarray, "d d"]:
    """Returns H in float64, with `rotate(x) = x @ H`: symmetric and orthogonal."""
    odd = _odd_part(dim)
    walsh = np.ones((1, 1))
    while len(walsh) < dim // odd:
        walsh = np.kron([[1, 1], [1, -1]], walsh)
    return np.kron(_reflection(odd, np.float64), walsh / np.sqrt(len(walsh)))


def _reflection(odd: int, dtype: type = np.float32) -> Float[np.ndarray, "o o"]:
    """Returns I - 2/o: where no Hadamard matrix exists, the symmetric orthogonal one of only two entries."""
    return (np.eye(odd) - 2 / odd if odd > 1 else np.eye(1)).astype(dtype)


def _odd_part(dim: int) -> int:
    return dim // (dim & -dim)
