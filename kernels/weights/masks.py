"""Masks of weights as bits, little end first, rows padded to 64-bit words."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt8

WORD = 8
"""Bytes that a row is padded to a multiple of: what a kernel reads at once."""


def width(inputs: int) -> int:
    """Returns the bytes of a row."""
    return WORD * -(-inputs // (8 * WORD))


def packed(kept: Bool[np.ndarray, "r k"]) -> UInt8[np.ndarray, "r b"]:
    """Returns the bits."""
    bits = np.packbits(kept, axis=1, bitorder="little")
    return np.pad(bits, ((0, 0), (0, width(kept.shape[1]) - bits.shape[1])))


def unpacked(mask: UInt8[Array, "r b"], inputs: int) -> Bool[Array, "r k"]:
    """Returns one truth value an input."""
    bits = mask[:, :, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
    return bits.reshape(mask.shape[0], -1)[:, :inputs].astype(bool)
