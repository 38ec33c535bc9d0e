"""The laws of the stores: what a row of n tokens holds depends on n alone, and Packed equals Rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quantize, words
from kernels.quantize import PACKED_BITS, Quantizer
from kernels.stores import Dense, Packed, Rounded, Split, exact_view, settled

CAPACITY, DIM, HEADS = 24, 8, 2
KINDS = ["dense", *(f"{kind}{bits}" for kind in ("packed", "rounded") for bits in PACKED_BITS)]
AXES = {"keys": "tokens", "values": "channels"}
ZERO = jnp.zeros(2, jnp.int32)
VISUAL = jnp.asarray(np.random.default_rng(9).random((2, CAPACITY)) < 0.4)


def make(kind: str, side: str, window: int = 0, capacity: int = CAPACITY, axis: str | None = None, **options):
    shape, quantizer = (2, HEADS, capacity, DIM), Quantizer(axis or AXES[side], 4, **options)
    if kind == "dense":
        return Dense.empty(shape, jnp.bfloat16)
    if kind.startswith("split"):
        return Split(
            text=make(f"packed{kind[-1]}", side, window),
            sinks=Dense.empty((2, HEADS, 2, DIM), jnp.bfloat16),
            visual=make("packed2", side, axis="tokens"),
            capacity=capacity,
        )
    if kind.startswith("packed"):
        return Packed.empty(shape, int(kind[-1]), side, quantizer, window, jnp.bfloat16)
    return Rounded.empty(shape, int(kind[-1]), quantizer, window, jnp.bfloat16)


def tokens(seed: int, count: int = CAPACITY):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, HEADS, count, DIM)), jnp.float32)


@jax.jit
def append(store, new, starts, counts):
    return store.append(new, starts, counts, VISUAL)


@jax.jit
def crop(store, lengths, kept):
    return store.crop(lengths, kept, VISUAL)


@jax.jit
def read(store, lengths):
    return store.read(lengths, VISUAL)


def held(x):
    """Values as a store of bfloat16 keeps them, in float32."""
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [*KINDS, "split3"])
@pytest.mark.parametrize("side", AXES)
@pytest.mark.parametrize("window", [0, 8])
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), short=st.integers(0, 5))
@settings(max_examples=5, deadline=None)
def test_a_prefill_leaves_what_appends_leave(kind, side, window, seed, cuts, short):
    """Bit for bit, whatever the cuts; the rows have unequal lengths."""
    total = min(sum(cuts), CAPACITY)
    lengths = jnp.asarray([total, max(total - short, 0)])
    x = tokens(seed)
    whole = append(make(kind, side, window), x, ZERO, lengths)
    store, start = make(kind, side, window), 0
    for cut in cuts:
        part = jnp.take(x, jnp.clip(jnp.arange(start, start + 5), 0, CAPACITY - 1), axis=2)  # one shape, one program
        starts = jnp.minimum(start, lengths)
        store = append(store, part, starts, jnp.clip(lengths - starts, 0, cut))
        start += cut
    assert_same(whole, store)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("side", AXES)
@pytest.mark.parametrize("options", [{}, {"clip": True, "metadata": "float8"}, {"codebook": "normal"}])
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(0, CAPACITY), min_size=2, max_size=2))
@settings(max_examples=5, deadline=None)
def test_packed_equals_rounded(bits, side, options, seed, lengths):
    lengths = jnp.asarray(lengths)
    packed = append(make(f"packed{bits}", side, 8, **options), tokens(seed), ZERO, lengths)
    rounded = append(make(f"rounded{bits}", side, 8, **options), tokens(seed), ZERO, lengths)
    np.testing.assert_allclose(read(packed, lengths), read(rounded, lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", AXES)
@pytest.mark.parametrize("window", [0, 4, 8])
def test_the_window_is_exact_and_the_rest_is_rounded(kind, side, window):
    x, length, step = tokens(3), 23, 4 if side == "keys" else 1
    lengths = jnp.full(2, length)
    store = append(make(kind, side, window), x, ZERO, lengths)
    seen, exact = np.asarray(read(store, lengths)), held(x)
    done = 0 if kind == "dense" else (length - window) // step * step
    np.testing.assert_array_equal(seen[:, :, done:length], exact[:, :, done:length])
    np.testing.assert_array_equal(seen[:, :, length:], 0)
    np.testing.assert_array_equal(store.rounded(lengths[:, None])[:, 0], np.arange(CAPACITY) < np.full((2, 1), done))
    if done:
        quantizer = Quantizer(AXES[side], 4)
        rounded = quantize.round_groups(jnp.asarray(exact[:, :, :done]), int(kind[-1]), quantizer)
        np.testing.assert_allclose(seen[:, :, :done], rounded, rtol=1e-6, atol=1e-6)
        assert np.abs(seen[:, :, :done] - exact[:, :, :done]).max() > 1e-4


@given(n=st.integers(0, 500), group=st.sampled_from([1, 4, 32]), blocks=st.integers(0, 4))
@settings(deadline=None)
def test_settled_is_whole_groups_behind_the_window(n, group, blocks):
    window = group * blocks
    done = int(settled(jnp.asarray(n), Quantizer("tokens", group), window))
    assert done % group == 0
    assert 0 <= done <= max(n - window, 0)
    assert n - done < window + group
    assert int(settled(jnp.asarray(n), Quantizer("channels", group), window)) == max(n - window, 0)


@pytest.mark.parametrize("kind", ["packed2", "split4"])
@pytest.mark.parametrize("side", AXES)
def test_exact_view_shows_new_tokens_unrounded(kind, side):
    x, starts = tokens(5), jnp.asarray([8, 3])
    store = append(make(kind, side), x, ZERO, starts)
    view = exact_view(store, x[:, :, :6], starts, VISUAL)
    for row, start in enumerate((8, 3)):
        np.testing.assert_array_equal(view[row, :, start : start + 6], held(x[:, :, :6])[row])
        np.testing.assert_array_equal(view[row, :, :start], store.read(starts, VISUAL)[row, :, :start])


@pytest.mark.parametrize("side", AXES)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_bytes_are_the_formula(side, bits):
    store = make(f"packed{bits}", side, 8, capacity=64)
    rows, meta = 2 * HEADS, 64 * DIM // 4 * 2 * 2
    outer, packed = (64, DIM) if side == "keys" else (DIM, 64)
    codes = sum(outer * words.count(packed, width) * 2 for width in words.PLANES[bits])
    ring = (8 + (4 if side == "keys" else 0)) * DIM * 2
    assert store.sizes == {"codes": rows * codes, "scales": rows * meta, "exact": rows * ring}
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(store)) == sum(store.sizes.values())
    if side == "values":
        assert codes == 64 * DIM * bits // 8


@pytest.mark.parametrize("side", AXES)
def test_a_split_store_deals_tokens_to_its_parts(side):
    """Sinks are exact, image tokens as a store of their own holds them, text as another: each in order."""
    x, lengths = tokens(6), jnp.asarray([22, 9])
    store = append(make("split4", side), x, ZERO, lengths)
    seen, visual = np.asarray(store.read(lengths, VISUAL)), np.asarray(VISUAL)
    for row, length in enumerate((22, 9)):
        at = np.arange(length)
        for part, own in (("visual", (at >= 2) & visual[row, :length]), ("text", (at >= 2) & ~visual[row, :length])):
            alone = make("packed2", side, axis="tokens") if part == "visual" else make("packed4", side)
            count = jnp.full(2, own.sum())
            mine = x[:, :, np.resize(at[own], CAPACITY)]  # one shape, one program
            alone = append(alone, mine, ZERO, count).read(count)[row, :, : own.sum()]
            np.testing.assert_array_equal(seen[row][:, at[own]], alone)
        np.testing.assert_array_equal(seen[row, :, :2], held(x)[row, :, :2])
        np.testing.assert_array_equal(seen[row, :, length:], 0)
    assert store.sizes == {
        kind: sum(part.sizes[kind] for part in (store.text, store.visual, store.sinks)) for kind in store.sizes
    }


def test_a_split_store_must_be_told_what_is_an_image():
    with pytest.raises(ValueError, match="visual: got None"):
        make("split4", "keys").append(tokens(0), ZERO, ZERO + 3)


@pytest.mark.parametrize("kind", ["dense", "packed3", "rounded3", "split4"])
@pytest.mark.parametrize("side", AXES)
@pytest.mark.parametrize("window", [0, 8])
@given(kept=st.integers(0, 20), more=st.integers(0, 4))
@settings(max_examples=8, deadline=None)
def test_a_cropped_row_keeps_what_it_shows_and_goes_on(kind, side, window, kept, more):
    x, lengths, kept = tokens(7), jnp.asarray([20, 17]), jnp.asarray([kept, min(kept, 16)])
    store = append(make(kind, side, window), x, ZERO, lengths)
    before = np.asarray(read(store, lengths))
    store = crop(store, lengths, kept)
    after, exact = np.asarray(read(store, kept)), held(x)
    for row, n in enumerate(np.asarray(kept)):
        kept_as_seen = (after[row] == before[row]) | (after[row] == held(jnp.asarray(before))[row])
        kept_as_seen |= after[row] == exact[row]
        assert kept_as_seen[:, :n].all()
        np.testing.assert_array_equal(after[row, :, n:], 0)
    fresh = tokens(8)
    store = append(store, fresh, kept, jnp.full(2, more))
    seen = np.asarray(read(store, kept + more))
    assert np.isfinite(seen).all()
    for row, n in enumerate(np.asarray(kept)):
        np.testing.assert_array_equal(seen[row, :, n + more :], 0)
        np.testing.assert_allclose(seen[row, :, n : n + more], held(fresh)[row, :, :more], atol=3)


@pytest.mark.parametrize(("side", "window"), [("keys", 8), ("values", 0)])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_crop_within_the_ring_leaves_no_trace(side, window, cut):
    """What was cut off is as if it had never been there: a draft taken back."""
    x, lengths = tokens(9), jnp.asarray([16, 19])
    kept = lengths - cut
    cropped = crop(append(make("packed3", side, window), x, ZERO, lengths), lengths, kept)
    never = append(make("packed3", side, window), x, ZERO, kept)
    np.testing.assert_array_equal(read(cropped, kept), read(never, kept))
    fresh, count = tokens(10), jnp.full(2, 5)
    cropped, never = (append(store, fresh, kept, count) for store in (cropped, never))
    np.testing.assert_array_equal(read(cropped, kept + 5), read(never, kept + 5))


@pytest.mark.parametrize("kind", [*KINDS, "split3"])
@pytest.mark.parametrize("side", AXES)
def test_what_exceeds_the_capacity_is_dropped(kind, side):
    """Nothing that is there is written over."""
    x = tokens(11)
    full = append(make(kind, side, 4), x, ZERO, jnp.full(2, 23))
    over = append(full, tokens(12), jnp.full(2, 23), jnp.full(2, 7))
    last = append(full, tokens(12), jnp.full(2, 23), jnp.full(2, 1))
    lengths = jnp.full(2, CAPACITY)
    np.testing.assert_array_equal(read(over, lengths), read(last, lengths))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bits": 5}, "bits"),
        ({"window": 6}, "window"),
        ({"shape": (1, 1, 22, 8)}, "capacity"),
        ({"quantizer": Quantizer("channels", 3)}, "head_dim"),
    ],
)
def test_geometry_is_checked_at_the_door(arguments, named):
    good = {
        "shape": (1, 1, 24, 8),
        "bits": 4,
        "side": "keys",
        "quantizer": Quantizer("tokens", 4),
        "window": 8,
        "dtype": jnp.bfloat16,
    }
    Packed.empty(**good)
    with pytest.raises(ValueError, match=named):
        Packed.empty(**(good | arguments))
