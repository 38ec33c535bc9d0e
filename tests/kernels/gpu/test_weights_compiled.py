"""Products with weight matrices compile for real GPUs without one: no spills, wide loads, within a budget of slots."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import sass

from kernels.gpu.device import Device
from kernels.gpu.weights.call import product
from kernels.gpu.weights.cases import Case
from kernels.gpu.weights.operand import PREPARES
from kernels.gpu.weights.tiles import Tiles, tiles_of

H200 = Device((9, 0), 132, "NVIDIA H200")
GATE = (4096, 11008)
MOST = {
    # (kind, bits, group, rows of x): issue slots a dense weight
    ("2:4", 16, None, 1): 2.45,
    ("2:4", 16, None, 16): 3.37,
    ("2:4", 8, None, 1): 2.77,
    ("2:4", 8, 64, 1): 3.15,
    ("2:4", 4, 128, 1): 3.03,
    ("dense", 8, None, 1): 1.27,
    ("dense", 8, 128, 16): 2.18,
    ("dense", 4, 128, 1): 1.55,
    ("dense", 4, 128, 16): 2.37,
    ("dense", 4, 64, 1): 2.1,
}
OLDER = [("2:4", 16, None, 1), ("dense", 8, None, 1), ("dense", 4, 128, 8)]


def made(keys: Iterable[tuple[str, int, int | None, int]]) -> dict[str, Any]:
    found = {}
    for kind, bits, group, m in keys:
        case = Case(kind, bits, group, GATE)
        x = jax.ShapeDtypeStruct((m, GATE[0]), jnp.bfloat16)
        run = functools.partial(product, tiles=tiles(case))
        found[str((kind, bits, group, m))] = (run, (x, case.abstract()))
    return found


def tiles(case: Case) -> Tiles:
    return tiles_of(case.abstract(), H200)


def newest() -> dict[str, Any]:
    return made(MOST)


def older() -> dict[str, Any]:
    return made(OLDER)


@sass.compiles
@pytest.mark.parametrize("key", MOST, ids=str)
def test_weights_compile_for_hopper(key: tuple[str, int, int | None, int]):
    kernel = checked(sass.compile_variants(newest, "h200")[str(key)])
    case = Case(*key[:3], GATE)
    matrix, own = case.abstract(), tiles(case)
    weights = own.rows * own.step * matrix.planes * matrix.columns
    read = weights * matrix.bits // 8 if key[0] == "dense" else weights * (matrix.bits + 2) // 16
    # The loop is one step, not several that the compiler unrolled: what it loads is its weights, and little of x.
    assert read <= kernel.loaded_bytes < 3 * read
    assert kernel.slots_per_element(weights) <= MOST[key]


@sass.compiles
@pytest.mark.parametrize("target", sass.OLDER_TARGETS)
@pytest.mark.parametrize("key", OLDER, ids=str)
def test_weights_compile_for_older_devices(target: str, key: tuple[str, int, int | None, int]):
    checked(sass.compile_variants(older, target)[str(key)])


def checked(compiled: sass.Compiled) -> sass.Kernel:
    """Returns the product's kernel; beside it there may be the one that prepares x."""
    assert compiled.error is None, compiled.error
    assert all(kernel.spilled_bytes == kernel.stack_bytes == 0 for kernel in compiled.kernels.values())
    (kernel,) = (kernel for name, kernel in compiled.kernels.items() if name != PREPARES)
    assert sass.loads(kernel.main_loop)[16] > 0
    return kernel
