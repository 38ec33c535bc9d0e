"""Every backend on every case: interpreted here, as it runs on a GPU, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_calls import expected, make, run

from kernels import attend as op
from kernels.cases import CASES, Case, relative_error
from kernels.gpu import device
from kernels.gpu.device import EMULATED, Device

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


def test_an_old_device_is_refused():
    case = Case((4, 4), (2, 2, 16), (12,), 32, group=16, value_group=16)
    turing = device.speaking_of(Device((7, 5), 68, "Tesla T4"))
    with turing, pytest.raises(ValueError, match=r"compute capability 8\.0, this device has 7\.5"):
        run(case, make(case), "triton")


def test_the_first_able_backend_runs():
    case = Case((4, 4), (2, 2, 16), (12,), 32, group=16, value_group=16)
    with op.recorded() as names, device.speaking_of(EMULATED):
        jax.eval_shape(lambda: op.attend(make(case).q, *case.stores(), jnp.asarray([3])))
    assert names == ["triton"]
