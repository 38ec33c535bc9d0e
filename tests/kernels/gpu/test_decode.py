"""Every backend on every case: interpreted here, as it runs on a GPU, against float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_calls import expected, make, run

from kernels import attend as op
from kernels.cases import CASES, Case, relative_error
from kernels.gpu import device
from kernels.gpu.device import EMULATED, Device
from kernels.gpu.mosaic import call as mosaic
from kernels.gpu.settled import layout
from kernels.reference import Call, Rows

LIMIT = 2e-3
"""The most that rounding may cost. float16 queries and weights cost about 1e-3; results stay in float32 here."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_triton_interpreted_equals_float64(name: str):
    case = CASES[name]
    made = make(case)
    with device.speaking_of(EMULATED):
        out = run(case, made._replace(q=made.q.astype(jnp.float32)), "triton")
    assert relative_error(np.asarray(out), expected(case, made)) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2)])
def test_what_one_token_outweighs_does_not_vanish(bits: tuple[int, int]):
    """A first token twelve nats above all others, with a value of next to nothing: the others are what is left."""
    case = Case(bits, (1, 1, 64), (256,), 256, group=32, value_group=32, metadata="float16")
    made = make(case)
    k = made.k.at[:, :, 0].set(made.q[:, :, 0] * jnp.asarray(12 / jnp.sum(made.q**2) * 8, jnp.bfloat16))
    made = made._replace(q=made.q.astype(jnp.float32), k=k, v=made.v.at[:, :, 0].set(0.0))
    with device.speaking_of(EMULATED):
        out = run(case, made, "triton")
    assert relative_error(np.asarray(out), expected(case, made)) <= 2 * LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_a_gpu_equals_float64(name: str, backend: str):
    if device.current() is None:
        pytest.skip("needs a CUDA device")
    case = CASES[name]
    made = make(case)
    try:
        out = run(case, made._replace(q=made.q.astype(jnp.float32)), backend)
    except ValueError as error:
        # What a backend leaves to the others it refuses by name; all else fails.
        if backend != "mosaic" or "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))
    assert relative_error(np.asarray(out), expected(case, made)) <= LIMIT


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_without_a_gpu_a_kernel_says_so(backend: str):
    if device.current() is not None:
        pytest.skip("this machine has a GPU")
    case = Case((4, 4), (2, 2, 16), lengths=(9,), capacity=32, group=16, value_group=16)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call: it needs a CUDA device"):
        run(case, make(case), backend)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case((4, 4), (2, 2, 16), (12,), 32, t=9, group=16, value_group=16), "it takes up to 8 queries a row, got 9"),
        (Case((4, 4), (1, 1, 320), (12,), 32, group=16, value_group=16), "head_dim of up to 256, got 320"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_its_reason(case: Case, reason: str):
    with device.speaking_of(EMULATED), pytest.raises(ValueError, match=reason):
        run(case, make(case), "triton")


def test_key_groups_that_are_no_power_of_two_are_refused():
    case = Case((4, 4), (2, 2, 16), (12,), 96, group=24, value_group=16)
    with device.speaking_of(EMULATED), pytest.raises(ValueError, match="keys are in groups of 24, no power of two"):
        run(case, make(case), "triton")


@pytest.mark.parametrize("sinks", [(1, 0), (1, 2)])
def test_sides_with_unlike_parts_are_refused(sinks: tuple[int, int]):
    cases = [Case((4, 4), (2, 2, 16), (12,), 32, group=16, value_group=16, sinks=count) for count in sinks]
    keys, values = cases[0].stores()[0], cases[1].stores()[1]
    q = make(cases[0]).q
    with device.speaking_of(EMULATED), pytest.raises(ValueError, match="keep different parts"):
        op.attend(q, keys, values, jnp.asarray([3]), backend="triton")


def test_an_exact_side_lends_only_its_sinks():
    case = Case((16, 4), (1, 1, 16), (20,), 64, group=16, value_group=16, sinks=2)
    keys, values = case.stores()
    rows = Rows(jnp.asarray([20]), jnp.asarray([19]))
    parts, tail = layout(Call(make(case).q, keys, values, rows, None, None, True, 1.0))
    assert tail is not None
    assert tail.k.shape == (1, 1, 2, 16)
    assert [int(part.counts[0]) for part in parts] == [18]


def test_no_length_leads_past_the_words():
    case = Case((4, 4), (1, 1, 16), (20,), 64, group=16, value_group=16)
    rows = Rows(jnp.asarray([500]), jnp.asarray([499]))
    parts, _ = layout(Call(make(case).q, *case.stores(), rows, None, None, True, 1.0))
    assert int(parts[0].counts[0]) == 64


@pytest.mark.parametrize(("name", "capability"), [("gfx90a", None), ("9.0", (9, 0)), ("12.0", (12, 0))])
def test_a_device_is_known_by_its_compute_capability(name: str, capability: tuple[int, int] | None, monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability=name, core_count=4, device_kind="a GPU")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    found = device.current()
    assert (found and found.capability) == capability


def test_an_old_device_is_refused():
    case = Case((4, 4), (2, 2, 16), (12,), 32, group=16, value_group=16)
    turing = device.speaking_of(Device((7, 5), 68, "Tesla T4"))
    with turing, pytest.raises(ValueError, match=r"compute capability 8\.0, this device has 7\.5"):
        run(case, make(case), "triton")


def test_what_is_hoppers_own_is_refused_elsewhere():
    case = Case((4, 4), (2, 2, 64), (40,), 128, group=32, value_group=32)
    blackwell = device.speaking_of(Device((10, 0), 148, "NVIDIA B200"))
    with blackwell, pytest.raises(ValueError, match=r"compute capability 9\.0 alone, this device has 10\.0"):
        run(case, make(case), "mosaic")


@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        (Case((4, 4), (32, 32, 128), (9,) * 8, 1024, group=32, value_group=32), "mosaic"),
        (Case((4, 4), (32, 32, 128), (9,) * 8, 1024), "triton"),
        (Case((4, 4), (32, 32, 128), (9,), 1024, group=32, value_group=32), "triton"),
        (Case((4, 4), (64, 32, 128), (9,) * 8, 1024, group=32, value_group=32), "triton"),
        (Case((16, 4), (32, 32, 128), (9,) * 8, 1024, value_group=32), "triton"),
    ],
    ids=["short groups, much cached", "long groups", "little cached", "grouped queries", "exact keys"],
)
def test_mosaic_is_taken_unasked_only_where_it_was_faster(case: Case, chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic, "unsupported", lambda *_: None)  # before jax 0.11 it is
    q = jax.ShapeDtypeStruct((len(case.lengths), case.heads[0], 1, case.heads[2]), jnp.bfloat16)
    keys, values = jax.eval_shape(case.stores)
    lengths = jnp.asarray(case.lengths)
    call = Call(q, keys, values, Rows(lengths, lengths - 1, None), None, None, True, 1.0)
    with device.speaking_of(Device((9, 0), 132, "NVIDIA H100")):
        assert op.choose(None, call) == chosen


@pytest.mark.parametrize(
    ("case", "counts", "rings"),
    [
        (Case((4, 4), (1, 1, 16), (20, 32), 64, group=16, value_group=16), (4, 0), (16, None)),
        (Case((4, 4), (1, 1, 16), (50, 7), 64, group=16, value_group=16, window=16), (18, 7), (32, 16)),
        (Case((16, 4), (1, 1, 16), (50, 7), 64, value_group=16, window=16), (16, 7), (None, 16)),
        (Case((4, 16), (1, 1, 16), (20, 32), 64, group=16), (4, 0), (16, None)),
        (Case((16, 4), (1, 1, 16), (20, 32), 64, value_group=16), None, None),
    ],
    ids=["no window", "a window", "exact keys", "exact values", "all settles at once"],
)
def test_the_latest_tokens_are_those_that_a_side_has_not_settled(case: Case, counts, rings):
    lengths = jnp.asarray(case.lengths)
    call = Call(make(case).q, *case.stores(), Rows(lengths, lengths - 1, None), None, None, True, 1.0)
    parts, tail = layout(call)
    assert tail is None
    latest = parts[0].latest
    if counts is None:
        assert latest is None
        return
    assert latest is not None
    assert tuple(latest.counts.tolist()) == counts
    sizes = [None if ring is None else ring.shape[2] for ring in (latest.keys, latest.values)]
    assert tuple(sizes) == rings


def test_the_first_able_backend_runs():
    case = Case((4, 4), (2, 2, 16), (12,), 32, group=16, value_group=16)
    with op.recorded() as names, device.speaking_of(EMULATED):
        jax.eval_shape(lambda: op.attend(make(case).q, *case.stores(), jnp.asarray([3])))
    assert names == ["triton"]
