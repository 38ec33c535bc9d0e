"""Every kernel variant compiles for real GPUs without one: no spills, wide loads, and instructions within a budget."""

from typing import Any

import pytest
import sass
from attend_shapes import variant

from kernels.gpu.triton import call

MOST = {
    # (keys' and values' bits, group, query rows): issue slots a key or value element
    (16, 16, 128, 1): 1.12,
    (8, 8, 128, 1): 2.33,
    (4, 4, 128, 1): 2.10,
    (3, 3, 128, 1): 2.65,
    (2, 2, 128, 1): 1.78,
    (4, 4, 32, 1): 2.83,
    (4, 4, 128, 4): 2.60,
    (2, 2, 128, 8): 1.93,
    (16, 16, 128, 4): 1.16,
}
MIXED = [(16, 4, 128, 1), (4, 16, 128, 1), (4, 2, 32, 8)]
"""Compiled without a budget: the two sides of a step take unlike numbers of bytes."""
OLDER = [(4, 4, 128, 1), (2, 2, 128, 1)]


def newest() -> dict[str, Any]:
    return {str(key): variant(call.partials, *key) for key in [*MOST, *MIXED]}


def older() -> dict[str, Any]:
    return {str(key): variant(call.partials, *key) for key in OLDER}


@sass.compiles
@pytest.mark.parametrize("key", [*MOST, *MIXED], ids=str)
def test_triton_compiles_for_hopper(key: tuple[int, int, int, int]):
    kernel = sass.compile_variants(newest, "h200")[str(key)].only()
    check(kernel)
    if key in MOST:
        # Words and exact rows come in loads of 16 bytes, metadata in narrower ones: these say what a pass takes.
        elements = 16 * sass.loads(kernel.main_loop)[16] * kernel.threads * 8 // key[0]
        assert kernel.slots_per_element(elements) <= MOST[key]


@sass.compiles
@pytest.mark.parametrize("target", sass.OLDER_TARGETS)
@pytest.mark.parametrize("key", OLDER, ids=str)
def test_triton_compiles_for_older_devices(target: str, key: tuple[int, int, int, int]):
    check(sass.compile_variants(older, target)[str(key)].only())


def check(kernel: sass.Kernel) -> None:
    assert kernel.spilled_bytes == 0
    assert kernel.stack_bytes == 0
    assert sass.loads(kernel.main_loop)[16] > 0
