"""Attention of prompts: float64 on every case by XLA and as cuDNN would compute it, and what is lowered for a GPU."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_calls import Made, alone, make
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from kernels import attend as op
from kernels.cases import PROMPTS, Case, relative_error
from kernels.gpu import device
from kernels.reference import Append
from kernels.rope import Rotation, rotations
from kernels.stores import Rounded, Store
from kernels.stores.base import take

HOPPER = device.Device((9, 0), 132)
EXACT, SPLIT = PROMPTS["exact"], PROMPTS["image tokens' values exact"]
KIVI, LATER = PROMPTS["4 bits, KIVI's format"], PROMPTS["KIVI's format, behind other tokens"]


class Way(NamedTuple):
    """How a case is run; see `kernels.attend.attend`. `before_rope`: its keys are kept so, its queries are not."""

    backend: str | None = "xla"
    round_own: bool = True
    before_rope: bool = False


def starts_of(case: Case) -> np.ndarray:
    return np.maximum(np.array(case.lengths) - case.t, 0)


def turn_of(case: Case) -> Rotation:
    return rotations(jnp.arange(case.capacity)[None], case.heads[2], 1e4)


@functools.cache
def filler(case: Case) -> Callable[..., tuple[list[Store], list[jax.Array]]]:
    """Returns a function of tokens and lengths: the stores that hold so many of the tokens, and what is read there."""

    @jax.jit
    def fill(made: Made, lengths: jax.Array) -> tuple[list[Store], list[jax.Array]]:
        visual, zero = case.is_image(), jnp.zeros_like(lengths)
        stores = zip(case.stores(), made[1:], strict=True)
        filled = [store.append(x, zero, lengths, visual) for store, x in stores]
        return filled, [store.read(lengths, visual) for store in filled]

    return fill


def call(case: Case, way: Way, made: Made, before: Sequence[Store], after: Sequence[Store]) -> jax.Array:
    """Returns the op on the stores before and after the prompts."""
    starts = jnp.asarray(starts_of(case))
    new = [take(x, starts[:, None] + jnp.arange(case.t)) for x in made[1:]]
    return op.attend(
        made.q,
        after[0],
        after[1],
        jnp.asarray(case.lengths),
        starts=starts,
        visual=case.is_image(),
        append=Append(new[0], new[1], before[0], before[1]),
        turn=turn_of(case) if way.before_rope else None,
        round_own=way.round_own,
        backend=way.backend,
    )


def traced(case: Case, way: Way, dtype: Any = jnp.bfloat16) -> jax.stages.Traced:
    """Returns the op without computing anything."""
    made = make(case)
    run = jax.jit(functools.partial(call, case, way))
    return run.trace(made._replace(q=made.q.astype(dtype)), case.stores(), case.stores())


def error(case: Case, way: Way, dtype: Any = jnp.float32) -> float:
    """Returns how far the op is from what each query would see alone, in float64; of padding it may give anything."""
    made, fill = make(case), filler(case)
    before, after = (fill(made, jnp.asarray(lengths))[0] for lengths in (starts_of(case), case.lengths))
    run = jax.jit(functools.partial(call, case, way))
    out = run(made._replace(q=made.q.astype(dtype)), before, after)
    real = np.arange(case.t) < (np.array(case.lengths) - starts_of(case))[:, None]
    return relative_error(*(np.asarray(x).swapaxes(1, 2)[real] for x in (out, expected(case, *way[1:]))))


@functools.cache
def expected(case: Case, round_own: bool, before_rope: bool) -> np.ndarray:
    """Returns softmax(q K^T / sqrt d) V in float64: each query over the stores as of when its token was the last.

    Without `round_own` it sees what was there as of the prompt's start, and the prompt itself unrounded.
    """
    made, starts = make(case), starts_of(case)
    out, own = np.zeros(made.q.shape), (np.arange(case.capacity) >= starts[:, None])[:, None, :, None]
    for i in range(case.t):
        lengths = np.minimum(starts + i + 1, case.lengths)
        _, stored = filler(case)(made, jnp.asarray(lengths if round_own else starts))
        keys, values = (
            np.float64(x) if round_own else np.where(own, np.float64(new), x)
            for x, new in zip(stored, made[1:], strict=True)
        )
        keys = turned(keys, turn_of(case)) if before_rope else keys
        out[:, :, i] = alone(np.float64(made.q[:, :, i]), keys, values, lengths)
    return out


def turned(keys: np.ndarray, turn: Rotation) -> np.ndarray:
    """Returns keys turned in float64, channel i as the real and i + d/2 as the imaginary part of a number."""
    half = keys.shape[-1] // 2
    numbers = keys[..., :half] + 1j * keys[..., half:]
    numbers = numbers * (np.float64(turn[0]) + 1j * np.float64(turn[1]))[..., :half]
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def flash(q, k, v, *, mask=None, is_causal=False, scale=None, implementation):
    """What cuDNN makes of float16: products summed in float32, weights before the division and results in float16."""
    assert (q.dtype, k.dtype, v.dtype, implementation) == (*[jnp.float16] * 3, "cudnn")
    b, t, h, d = q.shape
    grouped = q.astype(jnp.float32).reshape(b, t, k.shape[2], -1, d)
    scores = jnp.einsum("btkrd,bskd->bkrts", grouped, k.astype(jnp.float32)) * (d**-0.5 if scale is None else scale)
    if mask is not None:
        scores += jnp.where(mask, 0, jnp.float16(-(2**15)))[:, :, None]
    if is_causal:
        scores = jnp.where(jnp.arange(k.shape[1]) <= jnp.arange(t)[:, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    halves = weights.astype(jnp.float16).astype(jnp.float32)
    out = jnp.einsum("bkrts,bskd->bkrtd", halves, v.astype(jnp.float32)) / weights.sum(-1, keepdims=True)
    return out.reshape(b, h, t, d).swapaxes(1, 2).astype(jnp.float16)


@pytest.mark.parametrize("name", PROMPTS)
def test_xla_equals_float64(name: str):
    assert error(PROMPTS[name], Way()) <= 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", [EXACT, LATER])
def test_xla_of_half_the_digits_equals_float64(case: Case, dtype: Any):
    assert error(case, Way(), dtype) <= 2e-3


@pytest.mark.parametrize("case", [KIVI, LATER, SPLIT])
def test_a_prompt_that_sees_itself_unrounded(case: Case):
    assert error(case, Way(round_own=False)) <= 1e-4


@pytest.mark.parametrize("case", [KIVI, LATER])
def test_keys_kept_before_rope(case: Case):
    assert error(case, Way(before_rope=True)) <= 1e-4


@pytest.mark.parametrize("name", PROMPTS)
def test_in_float16_as_cudnn_computes_equals_float64(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", flash)
    with device.speaking_of(HOPPER):
        assert error(PROMPTS[name], Way("cudnn"), jnp.bfloat16) <= 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROMPTS)
def test_cudnn_on_a_gpu_equals_float64(name: str):
    if device.current() is None:
        pytest.skip("needs a CUDA device")
    assert error(PROMPTS[name], Way("cudnn"), jnp.bfloat16) <= 2e-3


@pytest.mark.parametrize(
    ("case", "round_own", "first", "later"),
    [
        (EXACT, True, 1, 1),
        (PROMPTS["4 bits, no window"], True, 2, 2),
        (PROMPTS["4 bits, no window"], False, 1, 3),
        (KIVI, True, 3, 3),
        (KIVI, False, 1, 3),
        (SPLIT, True, 4, 4),
    ],
)
def test_what_is_laid_end_to_end(case: Case, round_own: bool, first: int, later: int, monkeypatch: pytest.MonkeyPatch):
    """A first prompt's own tokens, or the whole capacity, once for each pair of states; one segment needs no mask."""
    seen = []

    def recorded(q, k, v, *, mask=None, is_causal=False, **_):
        seen.append((k.shape[1], None if mask is None else mask.shape, is_causal))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    traced(case, Way(round_own=round_own))
    b, own, whole = len(case.lengths), first * case.t, later * case.capacity
    plain = first == 1
    assert seen == [(own, None if plain else (b, 1, case.t, own), plain), (whole, (b, 1, case.t, whole), False)]


def test_stores_whose_width_is_data_are_seen_as_the_reference_does():
    case = PROMPTS["4 bits, no window"]
    before = [
        Rounded.empty(x.shape, 3, store.quantizer, 0, jnp.bfloat16)
        for x, store in zip(make(case)[1:], case.stores(), strict=True)
    ]

    @jax.jit
    def both(made: Made) -> list[jax.Array]:
        starts, lengths = jnp.asarray(starts_of(case)), jnp.asarray(case.lengths)
        after = [store.append(x, starts, lengths) for store, x in zip(before, made[1:], strict=True)]
        return [call(case, Way(name), made, before, after) for name in ("xla", "reference")]

    made = make(case)
    own, reference = both(made._replace(q=made.q.astype(jnp.float32)))
    assert relative_error(*(np.asarray(x)[0] for x in (own, reference))) <= 1e-5


def test_what_is_lowered_for_a_gpu_calls_cudnn_and_holds_no_scores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    with device.speaking_of(HOPPER), op.recorded() as names:
        exact, kivi = (_lowered(case, Way(None)) for case in (EXACT, KIVI))
    assert names == ["cudnn", "cudnn"]
    # Of a first prompt, and of those behind other tokens.
    assert sorted(_calls(exact)) == [("ScaleBiasSoftmax", "NO_MASK"), ("Softmax", "CAUSAL")]
    assert _calls(kivi) == [("ScaleBiasSoftmax", "NO_MASK")] * 2
    assert not _scores(kivi)
    assert _scores(_lowered(KIVI, Way("xla"))) == {"80x240xf32", "80x288xf32"}


def _scores(text: str) -> set[str]:
    """Returns the shapes, from the queries on, of arrays of float32 with a row for each query and token."""
    return set(re.findall(r"x(80x(?:240|288)xf32)>", text))


def _lowered(case: Case, way: Way) -> str:
    return traced(case, way).lower(lowering_platforms=("cuda",)).as_text()


def _calls(text: str) -> list[tuple[str, str]]:
    return [
        (line.split("__cudnn$fmha")[1].split("(")[0], line.split("mask_type\\22: \\22")[1].split("\\22")[0])
        for line in text.splitlines()
        if "__cudnn$fmha" in line
    ]


def test_on_a_cpu_prompts_take_the_reference_and_kernels_keep_their_few_queries():
    few = Case((16, 16), (2, 2, 16), (8,), 16, t=8)
    with op.recorded() as names:
        for case in (few, EXACT):
            traced(case, Way(None))
    assert names == ["reference", "reference"]


@pytest.mark.parametrize(
    ("case", "dtype", "gpu", "reason"),
    [
        (EXACT, jnp.bfloat16, device.Device((7, 5), 68), "compute capability 8.0, this device has 7.5"),
        (Case((16, 16), (2, 2, 16), (8,), 16, t=8), jnp.bfloat16, HOPPER, "more than 8 queries a row, got 8"),
        (Case((16, 16), (2, 2, 16), (8,), 8, t=9), jnp.bfloat16, HOPPER, "9 new tokens .* than a cache of 8 holds"),
        (EXACT, jnp.float32, HOPPER, "Q must be fp16/bf16.*, got float32"),
        (Case((16, 16), (2, 2, 20), (12,), 16, t=12), jnp.bfloat16, HOPPER, "multiple of 8, but got 20"),
    ],
)
def test_what_cudnn_cannot_is_refused_with_its_reason(
    case: Case, dtype: Any, gpu: device.Device, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    with device.speaking_of(gpu), pytest.raises(ValueError, match=f"'cudnn' cannot run this call: .*{reason}"):
        traced(case, Way("cudnn"), dtype)


def test_without_a_gpu_or_without_cudnn_it_says_so():
    if device.current() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="it needs a CUDA device"):
        traced(EXACT, Way("cudnn"))
    with device.speaking_of(HOPPER), pytest.raises(ValueError, match="cannot run this call: cuDNN"):
        traced(EXACT, Way("cudnn"))
