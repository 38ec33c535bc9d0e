"""Lloyd-Max levels for normal values: the least squared error that 4, 8 or 16 fixed levels can have.

Wider codes keep even levels, which lose next to nothing there. Such a code is no affine function of the value, so
kernels that take codes as numbers cannot read it.
Source: J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

WIDEST = 4
_POSITIVE = {
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


def _table() -> tuple[Float[np.ndarray, "bits 16"], Float[np.ndarray, "bits 15"]]:
    """Returns by bits the levels of unit variance, and the borders between them; unused places are infinite."""
    levels, borders = np.zeros((17, 16), np.float32), np.full((17, 15), np.inf, np.float32)
    for bits, positive in _POSITIVE.items():
        own = np.array([*(-x for x in reversed(positive)), *positive], np.float32)
        levels[bits, : len(own)] = own
        borders[bits, : len(own) - 1] = (own[1:] + own[:-1]) / 2
    return levels, borders


LEVELS, _BORDERS = _table()


def serves(bits: int | Int[Array, ""]) -> Bool[Array, ""]:
    """Returns whether codes of this width take these levels."""
    return jnp.asarray(bits) <= WIDEST


def codes(x: Float[Array, "*any"], bits: int | Int[Array, ""]) -> Float[Array, "*any"]:
    """Returns the codes of the levels nearest to values of zero mean and unit variance."""
    borders = jnp.asarray(_BORDERS)[bits]
    above = ((x > border).astype(jnp.float32) for border in borders)
    return functools.reduce(jnp.add, above)


def levels(codes: Float[Array, "*any"], bits: int | Int[Array, ""]) -> Float[Array, "*any"]:
    """Returns the levels of codes."""
    return jnp.take(jnp.asarray(LEVELS)[bits], codes.astype(jnp.int32), mode="clip")
