"""Kept weights as codes of 8 or 4 bits: symmetric rounding in groups of inputs, and the way back."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Num

MOST = {8: 127, 4: 7}
"""The largest code; the smallest is its negative."""
OFFSET = 8
"""What an int4 code is stored with added."""
SHARES = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
"""How much of a group's range may be kept, with outliers clipped: what leaves the least squared error wins."""


def rounded(
    rows: Float[np.ndarray, "r k"], bits: int, group: int
) -> tuple[Int[np.ndarray, "r k"], Float[np.ndarray, "r g"]]:
    """Returns codes and scales (bfloat16) of float32 rows; zeros neither count nor change.

    Raises:
        ValueError: a weight is no finite number.
    """
    if not np.isfinite(rows).all():
        raise ValueError("weights: got NaN or infinity, expected finite numbers")
    grouped, most = _grouped(rows, group), MOST[bits]
    span = np.abs(grouped).max(-1, keepdims=True)
    unit = np.where(span, span, 1)  # errors in units of it, so that their squares neither overflow nor vanish
    best = np.full(span.shape, np.inf, np.float32)
    kept = np.zeros(span.shape, np.float32)
    for share in SHARES[bits]:
        scale = _upwards(share * span / most)
        error = np.square(_codes(grouped, scale, most) * (scale / unit) - grouped / unit).sum(-1, keepdims=True)
        kept, best = np.where(error < best, scale, kept), np.minimum(error, best)
    codes = _codes(grouped, kept, most).reshape(rows.shape[0], -1)[:, : rows.shape[1]]
    return codes.astype(np.int8), kept[..., 0].astype(ml_dtypes.bfloat16)


def numbers(values: Num[Array, "*rows n"], bits: int, count: int) -> Float[Array, "*rows count"]:
    """Returns `count` values of the last axis as float32: floats, or codes without their scales."""
    if bits != 4:
        return values.astype(jnp.float32)
    pairs = jnp.stack([values & 15, values >> 4], axis=-1)
    return pairs.reshape(*values.shape[:-1], -1)[..., :count].astype(jnp.float32) - OFFSET


def stored(values: Num[np.ndarray, "*rows n"], bits: int) -> Num[np.ndarray, "*rows n2"]:
    """Returns values as they lie in memory: int4 codes two a byte along the last axis, a zero behind an odd number."""
    if bits != 4:
        return values
    odd = [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)]
    codes = (np.pad(values, odd) + OFFSET).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def spread(scales: Float[Array, "r g"], inputs: int, group: int) -> Float[Array, "r k"]:
    """Returns each input's scale in float32."""
    return jnp.repeat(scales.astype(jnp.float32), group, axis=1)[:, :inputs]


def _grouped(rows: np.ndarray, group: int) -> np.ndarray:
    """Returns rows as (r, groups, group), the last filled up with zeros."""
    filled = np.pad(rows, ((0, 0), (0, -rows.shape[1] % group)))
    return filled.reshape(rows.shape[0], -1, group)


def _codes(grouped: np.ndarray, scale: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.rint(grouped / np.where(scale, scale, 1)), -most, most)


def _upwards(scale: np.ndarray) -> np.ndarray:
    """Returns the scales as the next bfloat16 that is not smaller, so that the largest weight is not clipped."""
    nearest = scale.astype(ml_dtypes.bfloat16)
    above = (nearest.view(np.uint16) + 1).view(ml_dtypes.bfloat16)
    return np.where(nearest.astype(np.float32) < scale, above, nearest).astype(np.float32)
