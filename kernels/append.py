"""The public op: new tokens into one side of a layer's cache, by a kernel where one can. Choice of backend."""

import functools

from jaxtyping import Array, Float, Int

from kernels import backends
from kernels.backends import Backend
from kernels.gpu import device
from kernels.gpu.triton import append as triton
from kernels.stores import Packed, Split, Store
from kernels.stores.base import Visual


def append(
    store: Store,
    new: Float[Array, "b h t d"],
    starts: Int[Array, "b"],
    counts: Int[Array, "b"],
    visual: Visual = None,
    backend: str | None = None,
) -> Store:
    """Returns what `store.append` does, in one launch where a kernel can; `backend` is one of `BACKENDS`.

    Raises:
        ValueError: the chosen backend cannot serve this store (says why).
    """
    if isinstance(store, Split):
        return store.append(new, starts, counts, visual, into=functools.partial(append, backend=backend))
    chosen = backends.choose(backend, BACKENDS, "append to this store", store, new.shape[2])
    return BACKENDS[chosen].run(store, new, starts, counts)


def _by_triton(store: Store, new: Array, starts: Array, counts: Array) -> Store:
    gpu = device.current()
    assert isinstance(store, Packed)
    assert gpu is not None
    return triton.append(store, new, starts, counts, interpret=gpu.interpret)


def _not_by_triton(store: Store, t: int) -> str | None:
    if reason := device.lacking():
        return reason
    return triton.unsupported(store, t) if isinstance(store, Packed) else f"it writes no {type(store).__name__} store"


BACKENDS: dict[str, Backend] = {
    "triton": Backend(_by_triton, _not_by_triton),
    "reference": Backend(lambda store, *arrays: store.append(*arrays), lambda *_: None),
}
"""What appends to a store without parts, in order of preference, asked with the store and the number of new tokens.

XLA makes some twenty launches of what the kernel does in one.
"""
