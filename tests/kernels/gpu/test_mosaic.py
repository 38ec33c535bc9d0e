"""The Mosaic kernel: interpreted against float64, with no races, and compiled for Hopper within its budgets."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sass
from attend_calls import expected, make, run
from attend_shapes import CHANNELS, codes, queries, variant
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cases import Case, relative_error
from kernels.gpu import device
from kernels.gpu.mosaic import call
from kernels.gpu.settled import Part

LIMIT = 2e-3
"""The most that rounding may cost; see `test_decode`."""
CASES = {
    # Eight steps in one block: words are brought to a stage that was read before. The others' rows are split.
    "8 bits": Case((8, 8), (4, 4, 128), lengths=(1000, 7), capacity=1024),
    "4 bits": Case((4, 4), lengths=(512, 129)),
    "2 bits": Case((2, 2), lengths=(512, 1), heads=(1, 1, 128)),
    "4 bits, KIVI's format": Case((4, 4), lengths=(500, 33), group=32, value_group=32, metadata="float16", window=32),
    "four query heads on one, keys of 8 bits": Case((8, 4), (8, 2, 128), lengths=(400, 1)),
    "a draft of 2 tokens": Case((4, 4), t=2, lengths=(300, 2)),
}
MOST = {
    # (keys' and values' bits, group, query rows): issue slots a key or value element
    (8, 8, 128, 1): 2.47,
    (4, 4, 128, 1): 1.98,
    (2, 2, 128, 1): 1.60,
    (4, 4, 32, 1): 2.00,
    (4, 4, 128, 8): 2.42,
}
interpreted = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs jax 0.11")


def variants() -> dict[str, Any]:
    return {str(key): variant(call.partials, *key) for key in MOST}


@pytest.fixture
def compiled_fast() -> Iterator[None]:
    """Leaves out what XLA would spend most of a test's time on: it compiles the interpreter once a case."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.compile
@pytest.mark.usefixtures("compiled_fast")
@interpreted
@pytest.mark.parametrize("name", CASES)
def test_mosaic_interpreted_equals_float64(name: str):
    case = CASES[name]
    made = make(case)
    with device.speaking_of(device.EMULATED):
        out = run(case, made._replace(q=made.q.astype(jnp.float32)), "mosaic")
    assert relative_error(np.asarray(out), expected(case, made)) <= LIMIT
    assert not found_races()


def found_races() -> bool:
    """Returns whether the interpreter saw races in the kernel that it ran last."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    return get_races().races_found


@sass.compiles
@pytest.mark.parametrize("key", MOST, ids=str)
def test_mosaic_compiles_for_hopper(key: tuple[int, int, int, int]):
    kernel = sass.compile_variants(variants, "h200")[str(key)].only()
    assert kernel.spilled_bytes == 0
    assert kernel.stack_bytes == 0
    assert sass.loads(kernel.main_loop)[sass.BULK] > 0
    # Bulk loads do not say how much they load. A step is a block of value words, 64 tokens a field, of which there are
    # 16 / bits; of each token, keys and values. The loop also counts what not every step does: scaling the queries.
    tokens = 64 * 16 // key[1]
    assert kernel.slots_per_element(tokens * CHANNELS * 2) <= MOST[key]


@pytest.mark.parametrize(
    ("bits", "group", "rows", "reason"),
    [
        ((4, 4), 128, 1, None),
        ((2, 8), 32, 1, None),
        ((4, 4), 128, 9, "9 query rows a kv head, at most 8"),
        ((16, 4), 128, 1, "keys in 16 bits are no packed words"),
        ((4, 3), 128, 1, "values in 3 bits: two planes"),
        ((4, 4), 16, 1, "keys in groups of 16"),
        ((4, 4), 32, 8, "several query rows with 4 groups of values"),
    ],
)
def test_shapes_say_what_is_unsupported(bits: tuple[int, int], group: int, rows: int, reason: str | None):
    part = Part(codes("keys", bits[0], group), codes("values", bits[1], group), jnp.zeros((1,), jnp.int32))
    found = call.unsupported(queries(rows), part, None)
    if not hasattr(plgpu, "InterpretGPUParams"):
        reason = "it needs jax 0.11"
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")
