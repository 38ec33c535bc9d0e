"""Rotary position embedding. Source: RoFormer, arXiv:2104.09864."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "b 1 t d"], Float[Array, "b 1 t d"]]
"""Cosines and sines of every position."""


def rotations(positions: Int[Array, "b t"], dim: int, theta: float) -> Rotation:
    """Returns the cosines and sines in float32, halves repeated."""
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angles = positions[:, None, :, None].astype(jnp.float32) / theta**exponent
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "b h t d"], rotation: Rotation) -> Float[Array, "b h t d"]:
    """Returns x rotated in float32, pairing channel i with i + d/2 as Hugging Face's weights expect."""
    cos, sin = rotation
    x32 = x.astype(jnp.float32)
    # Halves change places by a reversal, which a GPU does in passing: a concatenation would be a launch.
    halves = jax.lax.rev(x32.reshape(*x.shape[:-1], 2, -1), (x.ndim - 1,)).reshape(x.shape)
    low = jnp.arange(x.shape[-1]) < x.shape[-1] // 2
    return (x32 * cos + jnp.where(low, -halves, halves) * sin).astype(x.dtype)
