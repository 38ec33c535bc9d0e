"""The word layout: packing is undone, `place` says where a code lies, `put` writes there alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import words


def draw(seed, *shape, bits):
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint16)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(codes, bits):
    """The words of each plane of codes, and the codes that these are unpacked to."""
    n = codes.shape[-1]
    run, widths = words.run_of(n, bits), words.PLANES[bits]
    planes = [words.pack(part, width, run) for part, width in zip(words.split(codes, bits), widths, strict=True)]
    parts = (words.unpack(plane, width, run, n) for plane, width in zip(planes, widths, strict=True))
    return planes, words.join(tuple(parts), bits)


@pytest.mark.parametrize("bits", words.PLANES)
@given(seed=st.integers(0, 99), n=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_unpack_undoes_pack_plane_by_plane(bits, seed, n):
    codes = draw(seed, 2, 3, n, bits=bits)
    planes, back = there_and_back(codes, bits)
    assert [plane.shape for plane in planes] == [(2, 3, words.count(n, width)) for width in words.PLANES[bits]]
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", words.PLANES)
def test_no_bit_is_wasted_where_blocks_fit(bits):
    assert sum(words.count(64, width) for width in words.PLANES[bits]) * 16 == 64 * bits


@pytest.mark.parametrize(
    ("bits", "width", "n", "run"),
    [(4, 4, 256, 64), (2, 2, 640, 16), (3, 1, 640, 8), (3, 2, 640, 8), (6, 4, 640, 16), (4, 4, 96, 8), (2, 2, 20, 1)],
)
def test_the_layout_is_as_the_formula_has_it(bits, width, n, run):
    """Field i of word t in a block of N runs is token i * run + t, at bit i * width."""
    assert words.run_of(n, bits) == run
    codes = draw(1, n, bits=width)
    packed = np.asarray(words.pack(jnp.asarray(codes), width, run))
    places = np.stack(words.place(jnp.arange(n), width, run), 1).tolist()
    fields = 16 // width
    for at in range(n):
        block, inside = divmod(at, fields * run)
        field, word = divmod(inside, run)
        assert packed[block * run + word] >> (field * width) & ((1 << width) - 1) == codes[at]
        assert places[at] == [block * run + word, field * width]


def test_the_wide_plane_alone_is_the_coarser_code():
    codes = jnp.arange(64)
    np.testing.assert_array_equal(words.split(codes, 6)[0], codes // 4)
    np.testing.assert_array_equal(words.split(codes % 8, 3)[0], codes % 8 // 2)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def put(codes, new, at, width, run, capacity):
    """The words with new codes put into them, and the codes that they are unpacked to."""
    written = words.put(words.pack(codes, width, run), new, at, width, run, capacity)
    return written, words.unpack(written, width, run, capacity)


@pytest.mark.parametrize("width", [8, 4, 2, 1])
@pytest.mark.parametrize("capacity", [64, 24])
def test_put_writes_where_it_is_told_and_nowhere_else(width, capacity):
    codes, new = draw(2, 1, 2, 3, capacity, bits=width), draw(3, 1, 2, 3, 5, bits=width)
    run = words.run_of(capacity, 3 if width == 1 else width)
    at = np.array([[3, 7, 11, 23, capacity]])
    written, read = put(codes, new, at, width, run, capacity)
    codes[..., at[0, :-1]] = new[..., :-1]
    np.testing.assert_array_equal(read, codes)
    np.testing.assert_array_equal(written, words.pack(jnp.asarray(codes), width, run))
