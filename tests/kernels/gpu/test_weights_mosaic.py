"""The Mosaic kernel of weight matrices: interpreted against float64, with no races, and compiled for Hopper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sass
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cases import relative_error
from kernels.gpu import device
from kernels.gpu.device import EMULATED, Device
from kernels.gpu.weights import mosaic
from kernels.gpu.weights.arrange import arranged
from kernels.gpu.weights.cases import Case, product64
from kernels.gpu.weights.operand import PREPARES

LIMIT = 2e-4
CASES = {
    # Six steps in one block: words are brought to a stage that was read before. The others' inputs are shared.
    "int8": Case("dense", 8, None, (768, 40)),
    "int4, groups of 128": Case("dense", 4, 128, (1024, 128), m=3),
    "int8, groups of 64": Case("dense", 8, 64, (256, 130), m=8),
}
GATE = (4096, 11008)
MOST = {(8, None): 1.9, (4, 128): 1.92}
"""Issue slots a weight by bits and group."""
pytestmark = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs jax 0.11")


@pytest.mark.compile
@pytest.mark.parametrize("name", CASES)
def test_weights_by_mosaic_interpreted_equal_float64(name: str):
    case = CASES[name]
    matrix, x = case.matrix(), jnp.asarray(case.x())
    made = arranged(matrix)
    with device.speaking_of(EMULATED):
        assert mosaic.unsupported(x, made) is None
        out = jax.jit(functools.partial(mosaic.product, splits=1 if name == "int8" else 2, interpret=True))(x, made)
    assert relative_error(np.asarray(out), product64(x, matrix)) <= LIMIT
    assert not found_races()


def found_races() -> bool:
    """Returns whether the interpreter saw races in the kernel that it ran last."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    return get_races().races_found


def variants() -> dict[str, Any]:
    found = {}
    for bits, group in MOST:
        x = jax.ShapeDtypeStruct((1, GATE[0]), jnp.bfloat16)
        matrix = Case("dense", bits, group, GATE).abstract()
        found[str((bits, group))] = (functools.partial(mosaic.product, splits=2), (x, matrix))
    return found


@sass.compiles
@pytest.mark.parametrize("key", MOST, ids=str)
def test_weights_by_mosaic_compile_for_hopper(key: tuple[int, int | None]):
    compiled = sass.compile_variants(variants, "h200")[str(key)]
    assert compiled.error is None, compiled.error
    assert all(kernel.spilled_bytes == kernel.stack_bytes == 0 for kernel in compiled.kernels.values())
    (kernel,) = (kernel for name, kernel in compiled.kernels.items() if name != PREPARES)
    assert sass.loads(kernel.main_loop)[sass.BULK] > 0
    # A step is 64 words of 128 rows.
    assert kernel.slots_per_element(128 * mosaic.WORDS * 16 // key[0]) <= MOST[key]


@pytest.mark.parametrize(
    ("case", "gpu", "reason"),
    [
        (Case("dense", 8, m=9), EMULATED, "it takes up to 8 rows of x, got 9"),
        (Case("2:4", 8), EMULATED, "it reads dense weights, not 2:4"),
        (Case("dense", 4, 64, (640, 64)), EMULATED, "160 words of a row are no multiple of 64"),
        (Case("dense", 8), Device((8, 9), 58), "it needs compute capability 9.0 alone, this device has 8.9"),
    ],
)
def test_what_the_mosaic_kernel_refuses(case: Case, gpu: Device, reason: str):
    with device.speaking_of(gpu):
        assert mosaic.unsupported(jnp.asarray(case.x()), arranged(case.matrix())) == reason
