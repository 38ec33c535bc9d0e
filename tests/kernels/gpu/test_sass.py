"""The harness that proves kernels without a GPU: it must see the difference between a good one and a bad one."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
import sass
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton as plt

PASSES = 64


def sums(x, *, block, warps):
    """Sums blocks of `x`, one a pass: `block / warps / 32` elements live in each thread."""

    def kernel(x_ref, out_ref):
        zeros = jnp.zeros((block,), jnp.float32)
        out_ref[...] = jax.lax.fori_loop(0, PASSES, lambda i, sum: sum + x_ref[pl.ds(i * block, block)], zeros)

    out = jax.ShapeDtypeStruct((block,), jnp.float32)
    parameters = plt.CompilerParams(num_warps=warps, num_stages=1)
    return pl.pallas_call(kernel, out_shape=out, compiler_params=parameters, name="sums")(x)


def tile_sums(x):
    """The same of tiles of 256 that TMA brings to shared memory, in Mosaic."""
    layout = plgpu.Layout.WG_STRIDED((256,), vec_size=2)

    def kernel(x_ref, out_ref, tile, arrived):
        def step(i, sum):
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(i * 256, 256)], tile, arrived)
            plgpu.barrier_wait(arrived)
            return sum + plgpu.load(tile, layout=layout)

        out_ref[...] = jax.lax.fori_loop(0, PASSES, step, plgpu.layout_cast(jnp.zeros((256,), jnp.float32), layout))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((256,), jnp.float32),
        scratch_types={"tile": plgpu.SMEM((256,), jnp.float32), "arrived": plgpu.Barrier()},
        grid=(1,),
        grid_names=("i",),
        kernel_name="tile_sums",
    )(x)


def _array(block):
    return (jax.ShapeDtypeStruct((PASSES * block,), jnp.float32),)


def triton_variants():
    return {
        "wide": (functools.partial(sums, block=1024, warps=4), _array(1024)),
        "narrow": (functools.partial(sums, block=128, warps=4), _array(128)),
    }


def variants():
    def both(x):
        return sums(2 * x, block=1024, warps=4) + jnp.tile(tile_sums(x), 4)

    return {
        **triton_variants(),
        "spills": (functools.partial(sums, block=16384, warps=1), _array(16384)),
        "refused": (functools.partial(sums, block=100, warps=4), _array(100)),
        "ends the process": (lambda x: os.abort(), _array(1)),
        "mosaic": (tile_sums, _array(256)),
        "both": (both, _array(1024)),
        "no kernel": (jnp.sin, _array(1)),
    }


@sass.compiles
def test_widths_of_loads():
    compiled = sass.compile_variants(variants)
    assert sass.loads(compiled["wide"].only().main_loop) == {16: 2}
    assert sass.loads(compiled["narrow"].only().main_loop).keys() == {4}
    assert sass.loads(compiled["mosaic"].only().main_loop).keys() == {sass.BULK}


@sass.compiles
def test_spills():
    compiled = sass.compile_variants(variants)
    wide, spills = compiled["wide"].only(), compiled["spills"].only()
    assert wide.spilled_bytes == wide.stack_bytes == 0
    assert wide.registers < 64
    assert spills.spilled_bytes > 256
    assert spills.stack_bytes > 256
    assert any(sass.opcode(text).startswith("LDL") for text in spills.main_loop)


@sass.compiles
def test_slots_per_element():
    compiled = sass.compile_variants(variants)
    wide, narrow = compiled["wide"].only(), compiled["narrow"].only()
    assert (wide.threads, wide.loaded_bytes) == (128, 1024 * 4)
    # 8 elements a thread: 8 additions, 2 loads, and what counts the passes.
    assert 10 / 8 <= wide.slots_per_element(1024) <= 20 / 8
    assert narrow.loaded_bytes > 128 * 4, "unrolled"
    assert narrow.slots_per_element(narrow.loaded_bytes / 4) > 1.2 * wide.slots_per_element(1024)


@sass.compiles
def test_a_mosaic_kernel():
    kernel = sass.compile_variants(variants)["mosaic"].only()
    assert (kernel.name, kernel.threads, kernel.spilled_bytes, kernel.stack_bytes) == ("tile_sums", 128, 0, 0)
    assert 1024 <= kernel.shared_bytes <= 2048
    assert len(kernel.loops) > 1, "waiting for the barrier is a loop of its own"
    assert any(sass.opcode(text).startswith("LDS") for text in kernel.main_loop)


@sass.compiles
def test_kernels_by_name():
    """Also those of a program that has others by XLA."""
    assert set(sass.compile_variants(variants)["both"].kernels) == {"sums", "tile_sums"}


@sass.compiles
def test_failures_are_told_and_the_rest_goes_on():
    compiled = sass.compile_variants(variants)
    assert set(compiled) == set(variants())
    assert "power of 2" in str(compiled["refused"].error)
    assert "ended with -6" in str(compiled["ends the process"].error)
    assert "no Pallas kernel" in str(compiled["no kernel"].error)
    with pytest.raises(AssertionError, match="power of 2"):
        compiled["refused"].only()


@sass.compiles
@pytest.mark.parametrize("target", sorted({path.stem for path in sass.TARGETS.glob("*.textproto")} - {"h200"}))
def test_other_targets(target):
    compiled = sass.compile_variants(triton_variants, target)
    assert sass.loads(compiled["wide"].only().main_loop) == {16: 2}


@sass.compiles
def test_a_module_that_cannot_be_loaded():
    with pytest.raises(RuntimeError, match="nowhere"):
        sass.compile_variants(triton_variants, "nowhere")


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_4) ;
.L_x_2:
        /*0050*/                   ISETP.NE.AND P1, PT, R6, R7, PT ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   STG.E [R8.64], R4 ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   WARPSYNC.COLLECTIVE R9, `(.L_x_2) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
        /*00f0*/                   NOP;
"""


def test_what_is_laid_out_behind_the_end_makes_no_loop():
    """Needs no compiler: a wait and its way back, lanes that diverge, and what is never reached."""
    from sass_worker import find_loops

    main, wait = sorted(find_loops(LISTING), key=len, reverse=True)
    assert [sass.opcode(text) for text in main] == [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "FADD", "BRA.DIV", "ISETP.NE.AND", "BRA", "BRA",
    ]  # fmt: skip
    assert len(wait) == 2


def test_a_loop_that_starts_at_its_condition():
    from sass_worker import find_loops

    listing = """
        /*0000*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
"""
    assert find_loops(listing) == [["LDG.E.128 R4, desc[UR4][R2.64]", "@P0 BRA `(.L_x_0)"]]


@pytest.mark.parametrize(
    ("instruction", "width"),
    [
        ("LDG.E.U8.CONSTANT R4, desc[UR4][R2.64]", 1),
        ("@!P0 LDG.E.U16 R4, desc[UR4][R2.64]", 2),
        ("LDGSTS.E.LTC128B P1, [R9], desc[UR6][R4.64]", 4),
        ("@P3 LDGSTS.E.BYPASS.LTC128B.128 [R9+0x2000], desc[UR6][R4.64]", 16),
        ("@UP0 UTMALDG.2D [UR8], [UR4]", sass.BULK),
        ("UBLKCP.S.G [UR8], [UR4], UR6", sass.BULK),
    ],
)
def test_width_of_a_load(instruction, width):
    assert sass.loads([instruction, "LDS.128 R4, [R2]", "STG.E.128 [R2.64], R4"]) == {width: 1}
