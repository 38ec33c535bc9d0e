"""Kernels with their products summed as an H100's matrix units sum: codes that are subnormal float16 lose nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_calls import expected, make, run

from kernels.cases import Case, relative_error
from kernels.gpu import decode, device
from kernels.gpu.device import EMULATED
from kernels.gpu.triton import keys, values

TERMS = 16
"""Products that are added up together, and to the sum so far."""
BITS = 25
"""How far below the largest one's exponent a term is cut off."""


def exponent(x: jax.Array) -> jax.Array:
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127


def power(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)


def summed(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum with a (n, k) @ b (k, m) added, k of 16 after 16, as arXiv:2512.07004 found of an H100.

    A product's exponent is the sum of its factors', whatever its digits, and a subnormal factor's is -14. All terms,
    the sum so far among them, lose what lies 25 bits below the largest exponent; the sum is cut to 24 bits.
    """
    for start in range(0, a.shape[1], TERMS):
        x, y = (part.astype(jnp.float32) for part in (a[:, start : start + TERMS], b[start : start + TERMS]))
        products = x[:, :, None] * y[None]
        exponents = jnp.maximum(exponent(x), -14)[:, :, None] + jnp.maximum(exponent(y), -14)[None]
        exponents = jnp.where(products == 0, -126, exponents)
        largest = jnp.maximum(jnp.max(exponents, axis=1), jnp.where(total == 0, -126, exponent(total)))
        unit = power(jnp.maximum(largest - BITS, -100))
        terms = jnp.concatenate([products, total[:, None]], axis=1)
        # 17 terms of up to 2^27 would not fit; those of codes are far smaller than their exponents say.
        whole = jnp.sum(jnp.trunc(terms / unit[:, None]).astype(jnp.int32), axis=1)
        size = jnp.abs(whole)
        cut = jnp.maximum(32 - jax.lax.clz(size) - 24, 0)
        total = jnp.sign(whole).astype(jnp.float32) * (size >> cut << cut).astype(jnp.float32) * unit
    return total


def test_the_emulated_unit_cuts_off_what_the_real_one_does():
    """The cases by which the paper tells units apart, and a plain product."""
    one = jnp.ones((1, 1))

    def of(total: float, *products: float) -> float:
        a = jnp.asarray([[*products, *[0.0] * (TERMS - len(products))]], jnp.float16)
        return float(summed(total * one, a, jnp.ones((TERMS, 1), jnp.float16))[0, 0])

    assert of(0.0, 2.0**-24, 3 * 2.0**-24) == 2.0**-22  # subnormal numbers are there
    assert of(1.0, *[2.0**-24] * 2) == 1 + 2.0**-23  # two bits more than float32 are kept until all are added
    assert of(1.0, 2.0**-24) == 1.0  # and then cut off
    assert of(4.0, *[2.0**-24] * 16) == 4.0  # each by itself below what is kept
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float16) for shape in ((8, 64), (64, 8)))
    plain = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(summed(jnp.zeros((8, 8)), a, b), plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_long_sums_lose_nothing(bits: int, monkeypatch: pytest.MonkeyPatch):
    """Thousands of tokens that one program sees, and that weigh about the same, so that little is left of their values.

    With values summed beyond a step it is off by 3e-3 at 8 bits, and with 1024 in the sums by far more.
    """
    case = Case((bits, bits), (1, 1, 64), (4096,), 4096, group=64, value_group=64)
    made = make(case)
    made = made._replace(q=made.q.astype(jnp.float32) / 8)
    for module in (keys, values):
        monkeypatch.setattr(module, "accumulate", summed)
    monkeypatch.setattr(decode, "_splits", lambda *_: 1)
    jax.clear_caches()  # a launch that was traced before knows nothing of this
    with device.speaking_of(EMULATED):
        out = run(case, made, "triton")
    jax.clear_caches()
    assert relative_error(np.asarray(out), expected(case, made)) <= 7e-4
