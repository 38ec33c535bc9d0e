"""The public op: new tokens into one side of a layer's cache, by a kernel where one can. Choice of backend."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from kernels.gpu import device
from kernels.gpu.triton import append as triton
from kernels.stores import Packed, Split, Store
from kernels.stores.base import Visual


class Backend(NamedTuple):
    """A way to append to a store without parts; `unsupported` says why it cannot take t tokens, or None."""

    run: Callable[[Store, Array, Array, Array], Store]
    unsupported: Callable[[Store, int], str | None]


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
    return BACKENDS[_choose(backend, store, new.shape[2])].run(store, new, starts, counts)


def _choose(name: str | None, store: Store, t: int) -> str:
    if name is None:
        return next(name for name, backend in BACKENDS.items() if backend.unsupported(store, t) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(store, t)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot append to this store: {reason}")
    return name


def _by_triton(store: Store, new: Array, starts: Array, counts: Array) -> Store:
    gpu = device.current()
    assert isinstance(store, Packed)
    assert gpu is not None
    return triton.append(store, new, starts, counts, interpret=gpu.interpret)


def _not_by_triton(store: Store, t: int) -> str | None:
    gpu = device.current()
    if gpu is None or gpu.capability < (8, 0):
        return "it needs a CUDA device of compute capability 8.0"
    return triton.unsupported(store, t) if isinstance(store, Packed) else f"it writes no {type(store).__name__} store"


BACKENDS: dict[str, Backend] = {
    "triton": Backend(_by_triton, _not_by_triton),
    "reference": Backend(lambda store, *arrays: store.append(*arrays), lambda *_: None),
}
"""In order of preference. XLA makes some twenty launches of what the kernel does in one."""
