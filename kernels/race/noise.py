"""Random numbers as a hash of their index: one fused loop, without the memory and the compile time of jax.random's.

jax.random's took 11 s to compile for a layer of 4 bits (two busy cores), and temporaries as large as the cache.
Source of the hash: C. Wellons, "Prospecting for Hash Functions" (lowbias32).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, UInt32


def bits(seed: int | Int[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Returns uniform words; other seeds give others. At most 2^32 of them."""
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _hash(index ^ _hash(jnp.asarray(seed).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))


def uniform(seed: int | Int[Array, ""], shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*shape"]:
    """Returns float32 numbers between the ends, both excluded."""
    unit = ((bits(seed, shape) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return low + (high - low) * unit


def normal(seed: int | Int[Array, ""], shape: tuple[int, ...]) -> BFloat16[Array, "*shape"]:
    """Returns normal numbers in bfloat16."""
    return (math.sqrt(2) * jax.lax.erf_inv(uniform(seed, shape, -1, 1))).astype(jnp.bfloat16)


def _hash(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
