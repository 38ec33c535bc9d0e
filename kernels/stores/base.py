"""What every store can do, and the arithmetic of positions that they share."""

from typing import Literal, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.quantize import Quantizer

Shape = tuple[int, int, int, int]
Side = Literal["keys", "values"]
Visual = Bool[Array, "b s"] | None
"""Which of a row's positions hold image tokens; needed by stores that keep these apart, else None."""


class Store(Protocol):
    """One side of one layer's cache.

    `append` adds the first counts[b] of the t new tokens to row b, which holds starts[b]; what exceeds the capacity
    is dropped, nothing is overwritten. `read` returns all positions as float32, as the query at the row's last token
    sees them, zero where the row has not been. `rounded` says which positions were quantized when the row was
    `ages` long. `crop` forgets all but the first `kept` tokens; what was rounded may stay rounded. `exact` says
    that nothing is ever rounded; `dtype` is that of tokens not rounded yet; `sizes` are the bytes of codes, of
    scales (spans and zeros) and of exact tokens.
    """

    @property
    def exact(self) -> bool: ...
    @property
    def dtype(self) -> DTypeLike: ...
    @property
    def capacity(self) -> int: ...
    @property
    def sizes(self) -> dict[str, int]: ...

    def append(
        self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"], visual: Visual = None
    ) -> Self: ...
    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]: ...
    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]: ...
    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> Self: ...


def exact_view(
    store: Store, new: Float[Array, "b h t d"], starts: Int[Array, "b"], visual: Visual = None
) -> Float[Array, "b h s d"]:
    """Returns what a store holds, with t more tokens in place after `starts` and nothing newly rounded."""
    stored = store.read(starts, visual)
    step = jnp.arange(stored.shape[2]) - starts[:, None]
    is_new = ((step >= 0) & (step < new.shape[2]))[:, None, :, None]
    return jnp.where(is_new, take(new.astype(store.dtype).astype(jnp.float32), step), stored)


def settled(lengths: Int[Array, "*b"], quantizer: Quantizer, window: int) -> Int[Array, "*b"]:
    """Returns how many of the first tokens are quantized in a row of this length."""
    return jnp.maximum(lengths - window, 0) // quantizer.step * quantizer.step


def nbytes(*leaves: Array | jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def positions(starts: Array, counts: Array, t: int, capacity: int) -> Int[Array, "b t"]:
    """Returns where t tokens go, with an index past the end (dropped by `write`) beyond a row's count."""
    step = jnp.arange(t)
    return jnp.where(step < counts[:, None], starts[:, None] + step, capacity)


def write(buffer: Array, new: Array, at: Int[Array, "b t"]) -> Array:
    """Returns the buffer with row b's token t written at position at[b, t]; out of range is dropped."""
    return jax.vmap(lambda row, x, i: row.at[:, i].set(x.astype(row.dtype), mode="drop"))(buffer, new, at)


def take(buffer: Array, at: Int[Array, "b t"]) -> Array:
    """Returns row b's tokens at positions at[b]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=1, mode="clip"))(buffer, at)


def within(lengths: Int[Array, "b"], capacity: int) -> Bool[Array, "b 1 s 1"]:
    """Returns which positions lie before a row's length, shaped to select tokens."""
    return (jnp.arange(capacity) < lengths[:, None])[:, None, :, None]


def check_geometry(shape: Shape, quantizer: Quantizer, window: int) -> None:
    """Raises ValueError unless groups fill the capacity, the window and the channels exactly."""
    group, step = quantizer.group, quantizer.step
    if group < 1 or window < 0 or window % step or shape[2] % step:
        raise ValueError(
            f"group, window, capacity: got {group}, {window}, {shape[2]}; expected a window and a capacity that are"
            " multiples of the group"
        )
    if quantizer.axis == "channels" and shape[3] % group:
        raise ValueError(f"group: got {group} along channels, expected a divisor of head_dim {shape[3]}")
