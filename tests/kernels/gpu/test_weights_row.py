"""Products of one row: interpreted and on GPUs against float64, what compiles, and the instructions they consist of."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sass
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.cases import relative_error
from kernels.gpu import device
from kernels.gpu.device import Device
from kernels.gpu.instructions import Meaning, Ptx, paired
from kernels.gpu.weights.arrange import arranged
from kernels.gpu.weights.cases import CASES, FORMATS, LAYERS, Case, product64
from kernels.gpu.weights.vector.call import MOST_INPUTS, ROWS, Share, product, share_of, unsupported
from kernels.weights import WeightFormat, encode

H200 = Device((9, 0), 132, "NVIDIA H200")
LIMIT = 3e-5
"""Of 16-bit fixed point, which keeps most numbers of bfloat16 as they are, and of sums in float32."""
FULL = 2.0**-15 / np.sqrt(3)
"""The same for numbers of float32, times the largest over the root of the mean square."""
ONE = {
    **{name: dataclasses.replace(case, m=1) for name, case in CASES.items() if case.values == jnp.bfloat16},
    "int8, several chunks": Case("dense", 8, None, (4500, 64)),
    "int4, several chunks": Case("dense", 4, 128, (9000, 64)),
    "int8, groups, several chunks": Case("dense", 8, 128, (4500, 64)),
    "2:4 in int8, several chunks": Case("2:4", 8, None, (6000, 64)),
    "2:4, several chunks": Case("2:4", 16, None, (6000, 64)),
}


@pytest.mark.parametrize("name", ONE)
def test_interpreted_equals_float64(name: str):
    case = ONE[name]
    matrix, x = case.matrix(), jnp.asarray(case.x())
    out = product(x, arranged(matrix), Share(8, 4, 3), interpret=True)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT


@pytest.mark.parametrize("scale", [2.0**-80, 1e30])
@pytest.mark.parametrize("name", ["int4, groups of 64", "2:4 in int8", "2:4"])
def test_x_of_any_size(name: str, scale: float):
    case = ONE[name]
    matrix, x = case.matrix(), jnp.asarray(case.x() * scale, jnp.bfloat16)
    out = product(x, arranged(matrix), Share(8, 4, 8), interpret=True)
    assert out.dtype == jnp.bfloat16
    assert relative_error(np.asarray(out, np.float64), product64(x, matrix)) <= 2e-3


def test_one_input_that_outweighs_all_others():
    case = ONE["int8"]
    matrix, x = case.matrix(), case.x()
    x[0, 7] = 1e4 * np.abs(x).max()
    out = product(jnp.asarray(x), arranged(matrix), Share(8, 4, 8), interpret=True)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= FULL * np.sqrt(x.size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("name", ["int8", "int4, groups of 64", "2:4 in int8"])
def test_x_with_more_digits_than_bfloat16(name: str, dtype: Any):
    case = ONE[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, case.shape[0])), dtype)
    matrix, numbers = case.matrix(), np.asarray(x, np.float64)
    out = np.asarray(product(x, arranged(matrix), Share(8, 4, 8), interpret=True), np.float64)
    spread = np.abs(numbers).max() / np.sqrt(np.mean(numbers**2))
    rounding = jnp.finfo(dtype).eps / 2  # of results, which have x's dtype
    assert relative_error(out, product64(numbers, matrix)) <= FULL * spread + rounding


@pytest.mark.parametrize(
    ("kind", "bits", "x"), [("dense", 8, 1.99999), ("dense", 8, -2.0), ("dense", 4, -2.0), ("2:4", 8, -2.0)]
)
def test_the_largest_sums_have_room(kind: str, bits: int, x: float):
    """All codes and all inputs as large as can be, with as many inputs as it takes."""
    case = Case(kind, bits, None, (MOST_INPUTS, 8))
    w = np.zeros(case.shape, np.float32)
    w[:: 2 if kind == "2:4" else 1] = -1
    matrix = encode(w, WeightFormat(kind, bits))
    out = product(jnp.full((1, MOST_INPUTS), x, jnp.float32), arranged(matrix), Share(8, 4, 1), interpret=True)
    expected = product64(np.full((1, MOST_INPUTS), x), matrix)
    assert np.abs(expected).min() > 0.4 * MOST_INPUTS
    np.testing.assert_allclose(out, expected, rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_input_is_not_rounded_out_of_its_bits(sign: int):
    case = ONE["int8"]
    matrix, x = case.matrix(), case.x()
    x[0, 5] = sign * np.nextafter(np.float32(2.0 ** np.ceil(np.log2(np.abs(x).max()))), np.float32(0))
    out = product(jnp.asarray(x), arranged(matrix), Share(8, 4, 8), interpret=True)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["int8", "2:4"])
def test_what_is_no_number_stays_none(name: str, bad: float):
    x = ONE[name].x()
    x[0, 5] = bad
    out = product(jnp.asarray(x), arranged(ONE[name].matrix()), Share(8, 4, 8), interpret=True)
    kept = np.asarray(ONE[name].matrix().rows())[:, 5] != 0
    assert not np.isfinite(np.asarray(out)[0, kept]).any()


@pytest.mark.parametrize(
    ("case", "rows", "reason"),
    [
        (Case("dense", 8), 2, "it takes one row of x, got 2"),
        (Case("dense", 8, None, (20000, 64)), 1, "it takes up to 16384 inputs, got 20000"),
        (Case("2:4", 16, values=jnp.float16), 1, "its floats are bfloat16, not float16"),
    ],
)
def test_what_it_refuses(case: Case, rows: int, reason: str):
    assert unsupported(jnp.ones((rows, case.shape[0])), case.abstract()) == reason


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", FORMATS)
def test_no_multiprocessor_has_many_turns_more_than_the_others(layer: str, name: str):
    for inputs, outputs, _ in LAYERS[layer].values():
        matrix = dataclasses.replace(FORMATS[name], shape=(inputs, outputs)).abstract()
        share = share_of(matrix, H200)
        count, each = matrix.values.shape[0] // share.rows, share.programs // H200.cores
        assert each * -(-count // share.programs) <= 1.2 * count / H200.cores + 1


def instructions(m: Any, a: Any, b: Any) -> list[Any]:
    """Returns what each instruction makes of two registers."""
    third = m.choose(a, b, 0x3715)
    sums = [m.dot(a, b, third, (one, other)) for one in (True, False) for other in (True, False)]
    # From 1 to 2, with so few bits that products are exact: twice rounded is once rounded.
    floats = [m.unlike(m.both(x, 0x007FF000), 0x3F800000) for x in (a, b, third)]
    logic = [m.both(a, b), m.either(a, b), m.unlike(a, b), m.inverse(a), m.up(a, 5), m.down(a, 5)]
    chosen = m.choose(a, b, m.both(b, 0x7777))
    constant = m.unlike(a, m.number(0x80808080))
    return [*logic, m.plus(a, b), constant, *sums, third, chosen, m.fma(*floats)]


def run_instructions(numbers: jax.Array, interpret: bool) -> jax.Array:
    """Returns all results for 16-bit numbers, two of which are a register."""
    count = len(instructions(Ptx(), "a", "b"))

    def kernel(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        a, b = a_ref[...], b_ref[...]
        for i in range(count):

            def body(m: Any, x: Any, y: Any, i: int = i) -> tuple[Any]:
                return (instructions(m, x, y)[i],)

            (out_ref[i, :],) = paired(body, [a, b], jnp.int16, 1, interpret)

    shape = jax.ShapeDtypeStruct((count, numbers.shape[1]), jnp.int16)
    params = plgpu.CompilerParams(num_warps=1, num_stages=1)
    return pl.pallas_call(kernel, out_shape=shape, interpret=interpret, compiler_params=params)(*numbers)


def test_no_instruction_is_left_out():
    used = {line.split()[0].split(".")[0] for line in _written()}
    assert len(used) == len([name for name in vars(Ptx) if name[0] != "_" and name != "count"])
    assert {name for name in vars(Meaning) if name[0] != "_"} == {
        name for name in vars(Ptx) if name[0] != "_" and name != "count"
    }


def _written() -> list[str]:
    ptx = Ptx()
    instructions(ptx, "a", "b")
    return ptx.lines


@pytest.mark.gpu
def test_instructions_mean_what_they_say():
    if device.current() is None:
        pytest.skip("needs a CUDA device")
    numbers = jnp.asarray(np.random.default_rng(0).integers(-(2**15), 2**15, (2, 256)), jnp.int16)
    np.testing.assert_array_equal(run_instructions(numbers, False), run_instructions(numbers, True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ONE)
def test_a_gpu_equals_float64(name: str):
    if (gpu := device.current()) is None:
        pytest.skip("needs a CUDA device")
    case = ONE[name]
    matrix, x = case.matrix(), jnp.asarray(case.x())
    for share in (share_of(arranged(matrix), gpu), Share(8, 4, 3)):
        out = product(x, arranged(matrix), share)
        assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT


GATE_UP = (4096, 22016)
SLOTS = {"2:4": 4.5, "2:4 int8": 3.1, "2:4 int4 g128": 4.0, "int8": 1.7, "int4 g128": 2.1}
"""The most issue slots a dense weight, in a turn."""
LONG = {
    **{name: FORMATS[name] for name in ("2:4", "2:4 int8", "int4 g128")},
    "int8 g64": Case("dense", 8, 64),
    "2:4 int4 g64": Case("2:4", 4, 64),
}


def compiled(case: Case, shape: tuple[int, int]) -> tuple[Any, Any]:
    matrix, x = dataclasses.replace(case, shape=shape).abstract(), jax.ShapeDtypeStruct((1, shape[0]), jnp.bfloat16)
    return functools.partial(product, share=share_of(matrix, H200)), (x, matrix)


def variants() -> dict[str, Any]:
    return {name: compiled(FORMATS[name], GATE_UP) for name in SLOTS}


def longest() -> dict[str, Any]:
    return {name: compiled(case, (MOST_INPUTS, 4096)) for name, case in LONG.items()}


@sass.compiles
@pytest.mark.parametrize("name", SLOTS)
def test_rows_compile_for_hopper(name: str):
    kernel, case = sass.compile_variants(variants, "h200")[name].only(), FORMATS[name]
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
    assert kernel.slots_per_element(ROWS * GATE_UP[0]) <= SLOTS[name]
    widths = sass.loads(kernel.main_loop)
    assert widths[16 if case.kind == "dense" else 4] >= ROWS
    # No weight is loaded by itself: scales are, those of groups for each piece, and one of a row.
    assert widths[2] <= (0 if case.group is None else ROWS * (4 if case.kind == "2:4" else 1)) + 1


@sass.compiles
@pytest.mark.parametrize("name", LONG)
def test_the_longest_rows_fit_into_registers(name: str):
    kernel = sass.compile_variants(longest, "h200")[name].only()
    assert kernel.spilled_bytes == kernel.stack_bytes == 0


@sass.compiles
@pytest.mark.parametrize("target", sass.OLDER_TARGETS)
@pytest.mark.parametrize("name", ["int8", "2:4"])
def test_rows_compile_for_older_devices(name: str, target: str):
    kernel = sass.compile_variants(variants, target)[name].only()
    assert kernel.spilled_bytes == kernel.stack_bytes == 0
