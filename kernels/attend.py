"""The public op: attention of new queries over one layer's cache. Contract, validation and choice of backend."""

import contextlib
import contextvars
from collections.abc import Iterator

from jaxtyping import Array, Float, Int

from kernels import backends, prefill, reference
from kernels.backends import Backend
from kernels.gpu import decode
from kernels.reference import Append, Call, Rows
from kernels.rope import Rotation
from kernels.stores import Store
from kernels.stores.base import Visual

BACKENDS: dict[str, Backend] = {
    "mosaic": Backend(decode.with_mosaic, decode.mosaic_unsupported, decode.mosaic_pays),
    "triton": Backend(decode.with_triton, decode.triton_unsupported),
    "reference": Backend(reference.attend, lambda _: None),
}
"""For a few queries a row, in order of preference: without a choice, the first that has no reason against it runs.

triton reads every width on every GPU since Ampere; mosaic serves fewer formats, on Hopper, and is taken where much is
cached in short groups, where it was 1.4 times as fast (measured on an H100); reference runs anywhere.
"""
PROMPTS: dict[str, Backend] = {
    "cudnn": Backend(prefill.with_cudnn, prefill.cudnn_unsupported),
    "reference": BACKENDS["reference"],
    "xla": Backend(prefill.with_xla, prefill.xla_unsupported),
}
"""For more queries a row, likewise.

cudnn holds no scores and reads a first prompt's own tokens alone. xla does the latter, too, and runs anywhere, but lays
a key out for each pair of states: a choice, because reference is faster where prompts see themselves rounded.
"""

_choices: contextvars.ContextVar[list[str]] = contextvars.ContextVar("choices")


def attend(
    q: Float[Array, "b h t d"],
    keys: Store,
    values: Store,
    lengths: Int[Array, "b"],
    *,
    starts: Int[Array, "b"] | None = None,
    visual: Visual = None,
    append: Append | None = None,
    turn: Rotation | None = None,
    round_own: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Float[Array, "b h t d"]:
    """Returns attention of t queries a row over the row's cached tokens, of which the last are the queries' own.

    Args:
        q: queries after RoPE; h is a multiple of the stores' k heads (grouped-query attention).
        keys, values: the stores, the queries' own tokens appended.
        lengths: tokens stored in each row now.
        starts: position of each row's first query; by default the last t positions. Rows padded on the right
            have queries past their length, whose results mean nothing.
        visual: which positions hold image tokens, if a store keeps these apart.
        append: how the queries' own tokens came; needed for t > 1 unless both stores are exact, because each
            query then sees what was rounded when the row ended with it.
        turn: the rotary embedding of all positions, if the keys are kept before it.
        round_own: whether several queries see the tokens of their own append rounded, as later queries will. A single
            query, a decode step, always sees them as the stores do.
        scale: factor of the scores, by default 1 / sqrt(d).
        backend: a name in `BACKENDS` or `PROMPTS`. An explicit choice never falls back.

    Raises:
        ValueError: shapes do not fit, or the chosen backend cannot serve this call (says why).
    """
    if q.ndim != 4:
        raise ValueError(f"q: got shape {q.shape}, expected (batch, heads, tokens, head_dim)")
    if q.shape[2] > 1 and append is None and not (keys.exact and values.exact):
        raise ValueError(f"append: got None for {q.shape[2]} queries a row; expected their keys and values unrounded")
    rows = Rows(lengths, lengths - q.shape[2] if starts is None else starts, visual)
    factor = float(q.shape[3] ** -0.5) if scale is None else scale
    call = Call(q, keys, values, rows, append, turn, round_own, factor)
    chosen = choose(backend, call)
    _choices.get([]).append(chosen)
    return {**PROMPTS, **BACKENDS}[chosen].run(call)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Yields a list to which every `attend` that is traced inside adds the name of its backend."""
    token = _choices.set([])
    try:
        yield _choices.get()
    finally:
        _choices.reset(token)


def choose(name: str | None, call: Call) -> str:
    """Returns the name of the backend that runs a call: `name` if it is given and able, else the first able one."""
    first = PROMPTS if call.q.shape[2] > decode.QUERIES else BACKENDS
    return backends.choose(name, {**first, **BACKENDS, **PROMPTS}, "run this call", call)
