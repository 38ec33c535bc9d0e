"""The public op: attention of new queries over one layer's cache. Contract, validation and choice of backend."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kernels import reference
from kernels.reference import Exact
from kernels.stores import Store


class Backend(NamedTuple):
    """A way to compute `attend`; `unsupported`, given the same arguments, says why it cannot, or None."""

    run: Callable[..., Array]
    unsupported: Callable[..., str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference.attend, lambda *_: None),
}
"""In order of preference: without an explicit choice, the first that has no reason against it runs."""


def attend(
    q: Float[Array, "b h t d"],
    keys: Store,
    values: Store,
    lengths: Int[Array, "b"],
    *,
    starts: Int[Array, "b"] | None = None,
    exact: Exact | None = None,
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
        exact: keys and values before this append rounded anything; needed for t > 1 unless both stores are exact.
        round_own: whether queries see the tokens of their own append rounded, as later queries will.
        scale: factor of the scores, by default 1 / sqrt(d).
        backend: a name in `BACKENDS`. An explicit choice never falls back.

    Raises:
        ValueError: shapes do not fit, or the chosen backend cannot serve this call (says why).
    """
    if q.ndim != 4:
        raise ValueError(f"q: got shape {q.shape}, expected (batch, heads, tokens, head_dim)")
    if q.shape[2] > 1 and exact is None and not (keys.exact and values.exact):
        raise ValueError(f"exact: got None for {q.shape[2]} queries a row; expected keys and values before rounding")
    starts = lengths - q.shape[2] if starts is None else starts
    scale = q.shape[3] ** -0.5 if scale is None else scale
    arguments = (q, keys, values, lengths, starts, exact, round_own, scale)
    return BACKENDS[choose(backend, *arguments)].run(*arguments)


def choose(name: str | None, *arguments) -> str:
    """Returns the name of the backend that runs a call: `name` if it is given and able, else the first able one."""
    if name is None:
        return next(name for name, backend in BACKENDS.items() if backend.unsupported(*arguments) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(*arguments)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}")
    return name
