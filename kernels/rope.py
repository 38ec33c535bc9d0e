"""Rotary position embedding. Source: RoFormer, arXiv:2104.09864."""

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
    low, high = jnp.split(x32, 2, axis=-1)
    return (x32 * cos + jnp.concatenate([-high, low], axis=-1) * sin).astype(x.dtype)
