"""The attention op against a float64 derivation, its door, and its table of backends."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attend as op
from kernels.quantize import Quantizer
from kernels.reference import Append
from kernels.stores import Dense, Packed

B, H, K, S, D = 2, 4, 2, 16, 8


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def filled(kind, x, lengths, axis="tokens"):
    shape, side = (B, K, S, D), "keys" if axis == "tokens" else "values"
    if kind == 16:
        store = Dense.empty(shape, jnp.float32)
    else:
        store = Packed.empty(shape, kind, side, Quantizer(axis, 4), 0, jnp.float32)
    return store.append(x, jnp.zeros(B, jnp.int32), lengths)


def formula(q, k, v, length, start):
    """softmax(q K^T / sqrt(d)) V in float64 for one row, query i seeing the positions up to start + i."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[0])
        for i in range(q.shape[1]):
            seen = min(start + i + 1, length)
            scores = k[kv, :seen] @ q[head, i] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[head, i] = weights / weights.sum() @ v[kv, :seen]
    return out


@pytest.mark.parametrize("kind", [16, 8, 2])
def test_one_query_equals_the_formula(kind):
    q, k, v, lengths = draw(0, B, H, 1, D), draw(1, B, K, S, D), draw(2, B, K, S, D), jnp.asarray([13, 6])
    keys, values = filled(kind, k, lengths), filled(kind, v, lengths, "channels")
    out = op.attend(q, keys, values, lengths)
    for row, length in enumerate((13, 6)):
        seen = formula(q[row], keys.read(lengths)[row], values.read(lengths)[row], length, length - 1)
        np.testing.assert_allclose(out[row], seen, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("round_own", [True, False])
def test_several_queries_see_what_each_would_have_seen_alone(round_own):
    """Query i attends as if it were the last of a row of its length: the same rule of what is rounded."""
    q, k, v, lengths = draw(3, B, H, 9, D), draw(4, B, K, 9, D), draw(5, B, K, 9, D), jnp.full(B, 9)
    keys, values, zero = filled(2, k, lengths), filled(2, v, lengths, "channels"), jnp.zeros(B, jnp.int32)
    empty_k, empty_v = filled(2, k, zero), filled(2, v, zero, "channels")
    append = Append(k, v, empty_k, empty_v)
    out = op.attend(q, keys, values, lengths, append=append, round_own=round_own)
    for i in range(9):
        length = jnp.full(B, i + 1)
        seen = (
            (filled(2, k, length), filled(2, v, length, "channels"))
            if round_own
            else (filled(16, k, length), filled(16, v, length))
        )
        alone = op.attend(q[:, :, i : i + 1], *seen, length)
        np.testing.assert_allclose(out[:, :, i : i + 1], alone, rtol=2e-5, atol=2e-5)


def test_several_queries_on_quantized_stores_need_their_append():
    k, lengths = draw(6, B, K, 9, D), jnp.full(B, 9)
    with pytest.raises(ValueError, match="append: got None for 9 queries"):
        op.attend(draw(7, B, H, 9, D), filled(4, k, lengths), filled(4, k, lengths), lengths)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    k, lengths = draw(8, B, K, 9, D), jnp.full(B, 9)
    q, dense = draw(9, B, H, 1, D), filled(16, k, lengths)
    picky = op.Backend(lambda *_: pytest.fail("ran although unsupported"), lambda *_: "needs a GPU")
    monkeypatch.setattr(op, "BACKENDS", {"picky": picky, **op.BACKENDS})
    assert op.attend(q, dense, dense, lengths).shape == q.shape
    with pytest.raises(ValueError, match=r"picky.*needs a GPU"):
        op.attend(q, dense, dense, lengths, backend="picky")
    with pytest.raises(ValueError, match="expected one of picky, mosaic, triton, reference"):
        op.attend(q, dense, dense, lengths, backend="fast")
