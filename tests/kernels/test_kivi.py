"""Our quantizer beside KIVI's, derived once more in NumPy from its paper and its published arithmetic.

KIVI (arXiv:2402.02750; `quant/new_pack.py` of its repository): a group's zero is its minimum and its scale
(max - min) / (2^b - 1), both as they are; a code is round(clamp((x - min) / scale, 0, 2^b - 1)), a value code * scale +
min. Keys are grouped along tokens, one scale a channel; values along channels, one scale a token. There is no case for
a constant group: 0 / 0. Ours differs in its metadata alone: float16, the zero rounded down, the span up.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from kernels.quantize import Quantizer, encode, round_groups

Side = Literal["keys", "values"]
AXIS = {"keys": "tokens", "values": "channels"}
BITS = (2, 4, 8)
"""The widths that KIVI packs."""
GROUP = 32
REPORTED = {2: 0.392, 4: 0.078, 8: 0.0046}
"""Root mean square error on N(0, 1) in groups of 32."""


def ours(x: np.ndarray, bits: int, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Returns our codes and the values they stand for, shaped as x: the one place that knows our API."""
    quantizer = Quantizer(AXIS[side], GROUP)
    codes = encode(quantizer.split(jnp.asarray(x)), bits, quantizer).codes
    return np.asarray(codes).reshape(x.shape), np.asarray(round_groups(jnp.asarray(x), bits, quantizer))


class Kivi(NamedTuple):
    """What KIVI makes of x, every field shaped as x: metadata is repeated for each member of its group."""

    codes: Float[np.ndarray, "b h n d"]
    values: Float[np.ndarray, "b h n d"]
    level: Float[np.ndarray, "b h n d"]
    """Where a value lies among its group's levels, before rounding."""
    low: Float[np.ndarray, "b h n d"]
    scale: Float[np.ndarray, "b h n d"]


def kivi(x: Float[np.ndarray, "b h n d"], bits: int, side: Side) -> Kivi:
    b, h, n, d = x.shape
    grouped = x.reshape(b, h, n // GROUP, GROUP, d) if side == "keys" else x.reshape(b, h, n, d // GROUP, GROUP)
    member = 3 if side == "keys" else 4
    low = np.amin(grouped, axis=member, keepdims=True)
    scale = (np.amax(grouped, axis=member, keepdims=True) - low) / np.float32(2**bits - 1)
    level = (grouped - low) / scale
    codes = np.rint(np.clip(level, 0, 2**bits - 1))
    parts = (codes, codes * scale + low, level, low, scale)
    return Kivi(*(np.broadcast_to(part, grouped.shape).reshape(x.shape) for part in parts))


def moved(theirs: Kivi, bits: int) -> np.ndarray:
    """Returns how many levels a value can move at most as the zero and the span are rounded outwards to float16.

    A lower zero lifts what lies at the minimum most and the maximum not at all, a wider span lowers the maximum most
    and the minimum not at all; in between the two partly cancel.
    """
    sunk = _spacing(theirs.low)
    widened = _spacing(theirs.scale * (2**bits - 1) + sunk)
    return np.maximum(sunk, widened) / theirs.scale + 1e-4


def _spacing(x: np.ndarray) -> np.ndarray:
    """Returns at least how far x is from the next float16 outwards."""
    return np.spacing(np.abs(x).astype(np.float16)).astype(np.float32)


def normal(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 128, 64), np.float32)


def keys_with_outliers() -> np.ndarray:
    """Returns what keys look like: a few channels far from zero and wide, for all tokens."""
    x = normal(1)
    x[..., [3, 40]] = x[..., [3, 40]] * 4 + 20
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("x", [normal(), keys_with_outliers()], ids=["normal", "outliers"])
def test_codes_are_kivis_but_at_rounding_borders(x: np.ndarray, side: Side, bits: int):
    theirs = kivi(x, bits, side)
    codes, _ = ours(x, bits, side)
    to_border = np.abs(theirs.level - np.floor(theirs.level) - 0.5)
    inside = to_border > moved(theirs, bits)
    np.testing.assert_array_equal(codes[inside], theirs.codes[inside])
    assert np.abs(codes - theirs.codes).max() <= 1
    # At 8 bits float16 is hardly finer than the levels: a third of the values are within its reach of a border.
    assert inside.mean() > {2: 0.99, 4: 0.97, 8: 0.6}[bits]
    assert (codes == theirs.codes).mean() > {2: 0.999, 4: 0.995, 8: 0.95}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_codes_are_kivis_where_float16_holds_the_metadata(side: Side, bits: int):
    x = np.rint(normal(2) * 16) / 16
    theirs = kivi(x, bits, side)
    codes, values = ours(x, bits, side)
    # A value exactly between two levels may fall to either side: scale and span / levels differ in the last bit.
    tie = np.abs(theirs.level - np.floor(theirs.level) - 0.5) < 1e-4
    np.testing.assert_array_equal(codes[~tie], theirs.codes[~tie])
    np.testing.assert_allclose(values[~tie], theirs.values[~tie], atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("x", [normal(), keys_with_outliers()], ids=["normal", "outliers"])
def test_the_error_is_at_most_half_a_step(x: np.ndarray, side: Side, bits: int):
    theirs = kivi(x, bits, side)
    assert (np.abs(theirs.values - x) <= theirs.scale / 2 + 1e-5).all()
    half_a_step = theirs.scale / 2 * (1 + 2 * moved(theirs, bits) / (2**bits - 1))
    assert (np.abs(ours(x, bits, side)[1] - x) <= half_a_step + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_reported_error_on_normal_values(side: Side, bits: int):
    x = np.random.default_rng(3).standard_normal((4, 8, 1024, 64), np.float32)
    theirs, own = (_rms(values - x) for values in (kivi(x, bits, side).values, ours(x, bits, side)[1]))
    assert own == pytest.approx(theirs, rel=0.005)
    assert own == pytest.approx(REPORTED[bits], rel=0.01)


def test_the_axes_matter_as_kivi_says():
    x = keys_with_outliers()
    along_tokens, along_channels = (_rms(ours(x, 2, side)[1] - x) for side in ("keys", "values"))
    assert along_channels > 3 * along_tokens


def _rms(x: np.ndarray | Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
