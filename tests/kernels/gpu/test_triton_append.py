"""The kernel that appends: bit for bit what the store's own append leaves, and code that keeps within registers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sass

from kernels import metadata
from kernels.gpu.triton.append import append, unsupported
from kernels.gpu.triton.rounding import Rounding
from kernels.quantize import Quantizer
from kernels.stores import Packed

AXES = {"keys": "tokens", "values": "channels"}
DIM, GROUP = 32, 16


def empty(
    side, bits, window=0, capacity=256, axis=None, dim=DIM, group=GROUP, shape=(5, 2), dtype=jnp.bfloat16, **options
):
    quantizer = Quantizer(axis or AXES[side], group, **options)
    return Packed.empty((*shape, capacity, dim), bits, side, quantizer, window, dtype)


def filled(store, rng):
    """The store with anything in it: what an append must neither touch nor heed shows up as a difference."""
    bits = [jnp.asarray(rng.integers(0, 1 << 16, x.shape), jnp.uint16) for x in store.codes]
    span, zero, recent = (
        jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (store.span, store.zero, store.recent)
    )
    return store.replace(codes=tuple(bits), span=span, zero=zero, recent=recent)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(z).view(f"u{z.dtype.itemsize}") for z in (x, y))
        np.testing.assert_array_equal(x, y)


CASES = [
    ("keys", 8, 1, 0, {}),
    ("keys", 6, 5, 32, {"clip": True, "metadata": "float8"}),
    ("keys", 4, 70, 32, {}),
    ("keys", 3, 1, 32, {"clip": True, "metadata": "float8"}),
    ("keys", 2, 70, 0, {"metadata": "float8", "dtype": jnp.float32}),
    ("values", 8, 70, 32, {}),
    ("values", 6, 1, 32, {"clip": True, "metadata": "float8"}),
    ("values", 4, 1, 0, {"dtype": jnp.float16}),
    ("values", 3, 70, 0, {"metadata": "float8"}),
    ("values", 2, 5, 20, {"clip": True, "capacity": 100}),
]


def check(case, interpret, **changes):
    """Rows that grow from nothing, across blocks and to the end, and one that gets nothing; several times in a row."""
    side, bits, t, window, options = case
    rng = np.random.default_rng(bits * t)
    own = expected = filled(empty(side, bits, window, **options | changes), rng)
    capacity = own.capacity
    starts = jnp.asarray([0, 47 if t > 1 else 63, capacity - 3, 17, capacity - t - 2], jnp.int32)
    counts = jnp.asarray([t, t, t, 0, max(t - 2, 1)], jnp.int32)
    reference, kernel = jax.jit(Packed.append), jax.jit(functools.partial(append, interpret=interpret))
    for scale in (1.0, 30.0, 0.0):
        new = jnp.asarray(rng.standard_normal((5, 2, t, DIM)) * scale + 1, jnp.float32)
        # By the CPU, whose division is exact: on a GPU XLA's need not be.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            expected = reference(*jax.device_get((expected, new, starts, counts)))
        own = kernel(own, new, starts, counts)
        assert_same_bits(own, expected)
        starts = jnp.minimum(starts + counts, capacity)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_append_leaves_what_the_stores_own_leaves(case):
    check(case, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_it_does_on_a_gpu(case):
    """Without clipping, which takes the other of two shares where their errors differ by the rounding of sums."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA device")
    check(case, interpret=False, clip=False)


@pytest.mark.parametrize("kind", ["float16", "float8"])
def test_metadata_is_rounded_as_elsewhere(kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 20, 20000)
    ends = np.float32([0.0, -0.0, 448, -448, 449, -449, 65504, -65504, 7e4, -7e4, 2**-9, -(2**-9), 2**-24, -(2**-24)])
    x = jnp.asarray(np.concatenate([x, ends, np.asarray(metadata.nearest(x, kind))]), jnp.float32)
    rounding = Rounding(4, kind, False, True)
    expected, own = jax.jit(lambda x: (metadata.at_most(x, kind), rounding.at_most(x)))(x)
    np.testing.assert_array_equal(own, expected.astype(jnp.float32))
    np.testing.assert_array_equal(rounding.stored(own).view(expected.dtype).view(jnp.int8), expected.view(jnp.int8))


@pytest.mark.parametrize(
    ("reason", "store", "t"),
    [
        ("0 tokens", empty("keys", 4), 0),
        ("codebook", empty("keys", 4, codebook="normal"), 1),
        ("along channels", empty("keys", 4, axis="channels"), 1),
        ("along tokens", empty("values", 4, axis="tokens"), 1),
        ("powers of two", empty("values", 4, dim=48), 1),
        ("powers of two", empty("keys", 4, capacity=240, group=24), 1),
        ("fill a word", empty("keys", 3, dim=8), 1),
        ("elements", empty("keys", 4, capacity=1024, dim=128, group=512), 1),
    ],
)
def test_what_is_not_supported_is_said(reason, store, t):
    assert reason in unsupported(store, t)
    with pytest.raises(ValueError, match=reason):
        append(store, jnp.zeros((5, 2, t, store.recent.shape[3])), jnp.zeros(5, jnp.int32), jnp.zeros(5, jnp.int32))


def variants():
    clipped = {"clip": True, "metadata": "float8"}
    cases = {
        "decode, keys": ("keys", 4, 1, 0, {}),
        "decode, clipped keys": ("keys", 3, 1, 32, clipped),
        "decode, keys in large groups": ("keys", 6, 1, 0, clipped | {"group": 128}),
        "decode, values": ("values", 4, 1, 0, {}),
        "decode, clipped values": ("values", 6, 1, 32, clipped),
        "prompt, keys": ("keys", 8, 300, 0, clipped),
        "prompt, values": ("values", 3, 300, 32, clipped),
        "prompt, values in large heads": ("values", 2, 300, 0, clipped | {"dim": 256, "group": 128}),
    }
    return {name: (_leaves, _shapes(*case)) for name, case in cases.items()}


def _leaves(*args):
    """All that an append writes; an empty ring would come to a program of its own, without a kernel."""
    return [x for x in jax.tree.leaves(append(*args)) if x.size]


def _shapes(side, bits, t, window, options):
    options = {"dim": 128, "group": 32} | options
    store = jax.eval_shape(lambda: empty(side, bits, window, 4096, shape=(2, 8), **options))
    new = jax.ShapeDtypeStruct((2, 8, t, options["dim"]), jnp.bfloat16)
    return store, new, *[jax.ShapeDtypeStruct((2,), jnp.int32)] * 2


@sass.compiles
@pytest.mark.parametrize("target", ["h200", "a100"])
def test_one_kernel_and_nothing_spills(target):
    for name, compiled in sass.compile_variants(variants, target).items():
        kernel = compiled.only()
        assert kernel.spilled_bytes == kernel.stack_bytes == 0, name
