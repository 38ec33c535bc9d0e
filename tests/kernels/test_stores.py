"""The laws of the stores: what a row of n tokens holds depends on n alone, and Packed equals Rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quantize
from kernels.stores import Dense, Packed, Rounded, exact_view, settled

CAPACITY, DIM, HEADS = 24, 8, 2
KINDS = ["dense", *(f"{kind}{bits}" for kind in ("packed", "rounded") for bits in quantize.PACKED_BITS)]


def make(kind: str, axis: str, window: int, batch: int = 2):
    shape = (batch, HEADS, CAPACITY, DIM)
    if kind == "dense":
        return Dense.empty(shape, jnp.bfloat16)
    family = Packed if kind.startswith("packed") else Rounded
    return family.empty(shape, int(kind[-1]), axis, 4, window, jnp.bfloat16)


def tokens(seed: int, count: int = CAPACITY, batch: int = 2):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, HEADS, count, DIM)), jnp.float32)


@jax.jit
def append(store, new, starts, counts):
    return store.append(new, starts, counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("window", [0, 8])
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), short=st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_a_prefill_leaves_what_appends_leave(kind, axis, window, seed, cuts, short):
    """Bit for bit, whatever the cuts; the rows have unequal lengths."""
    total = sum(cuts[:6])
    lengths = jnp.asarray([min(total, CAPACITY), max(min(total, CAPACITY) - short, 0)])
    x = tokens(seed)
    whole = append(make(kind, axis, window), x, jnp.zeros(2, jnp.int32), lengths)
    store, start = make(kind, axis, window), 0
    for cut in cuts:
        part = jnp.take(x, jnp.clip(jnp.arange(start, start + 5), 0, CAPACITY - 1), axis=2)  # one shape, one program
        starts = jnp.minimum(start, lengths)
        store = append(store, part, starts, jnp.clip(lengths - starts, 0, cut))
        start += cut
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(store), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", quantize.PACKED_BITS)
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(0, CAPACITY), min_size=2, max_size=2))
@settings(max_examples=8, deadline=None)
def test_packed_equals_rounded(bits, axis, seed, lengths):
    lengths = jnp.asarray(lengths)
    zero = jnp.zeros(2, jnp.int32)
    packed = append(make(f"packed{bits}", axis, 8), tokens(seed), zero, lengths)
    rounded = append(make(f"rounded{bits}", axis, 8), tokens(seed), zero, lengths)
    np.testing.assert_allclose(packed.read(lengths), rounded.read(lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 4, 8])
def test_the_window_is_exact_and_the_rest_is_rounded(kind, window):
    x, length = tokens(3), 23
    lengths = jnp.full(2, length)
    store = append(make(kind, "tokens", window), x, jnp.zeros(2, jnp.int32), lengths)
    read, exact = np.asarray(store.read(lengths)), np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))
    done = 0 if kind == "dense" else (length - window) // 4 * 4
    np.testing.assert_array_equal(read[:, :, done:length], exact[:, :, done:length])
    np.testing.assert_array_equal(read[:, :, length:], 0)
    if done:
        assert int(store.settled(lengths)[0]) == done
        rounded = quantize.round_groups(jnp.asarray(exact[:, :, :done]), int(kind[-1]), 4, "tokens")
        np.testing.assert_allclose(read[:, :, :done], rounded, rtol=1e-6, atol=1e-6)
        assert np.abs(read[:, :, :done] - exact[:, :, :done]).max() > 1e-4


@given(n=st.integers(0, 500), group=st.sampled_from([1, 4, 32]), blocks=st.integers(0, 4))
@settings(deadline=None)
def test_settled_is_whole_blocks_behind_the_window(n, group, blocks):
    window = group * blocks
    done = int(settled(jnp.asarray(n), group, window))
    assert done % group == 0
    assert 0 <= done <= max(n - window, 0)
    assert n - done < window + group


def test_exact_view_shows_new_tokens_unrounded():
    x, starts = tokens(5), jnp.asarray([8, 3])
    store = append(make("packed2", "tokens", 0), x, jnp.zeros(2, jnp.int32), starts)
    view = exact_view(store, x[:, :, :6], starts)
    held = np.asarray(x[:, :, :6].astype(jnp.bfloat16).astype(jnp.float32))
    for row, start in enumerate((8, 3)):
        np.testing.assert_array_equal(view[row, :, start : start + 6], held[row])
        np.testing.assert_array_equal(view[row, :, :start], store.read(starts)[row, :, :start])


@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize("bits", quantize.PACKED_BITS)
def test_bytes_are_the_formula(axis, bits):
    store = make(f"packed{bits}", axis, 8, batch=3)
    rows, group = 3 * HEADS, 4
    groups = CAPACITY // group * DIM if axis == "tokens" else CAPACITY * (DIM // group)
    expected = rows * (CAPACITY * DIM * bits // 8 + groups * 2 * 2 + (8 + group) * DIM * 2)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(store)) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bits": 3}, "bits"),
        ({"window": 6}, "window"),
        ({"shape": (1, 1, 22, 8)}, "capacity"),
        ({"shape": (1, 1, 24, 6), "bits": 2}, "head_dim"),
    ],
)
def test_geometry_is_checked_at_the_door(arguments, named):
    good = {"shape": (1, 1, 24, 8), "bits": 4, "axis": "tokens", "group": 4, "window": 8, "dtype": jnp.bfloat16}
    Packed.empty(**good)
    with pytest.raises(ValueError, match=named):
        Packed.empty(**(good | arguments))
