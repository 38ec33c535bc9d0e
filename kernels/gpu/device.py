"""The GPU that kernels are made for: the one there is, or one that is only spoken of."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Device(NamedTuple):
    """Compute capability, multiprocessors and name of a GPU. `interpret`: kernels run on the CPU, slowly, for tests."""

    capability: tuple[int, int]
    cores: int
    kind: str = ""
    interpret: bool = False


USUAL_CORES = 132
"""Of an H100, where the device does not say: how a row is shared depends on it, not what comes of it."""
EMULATED = Device((9, 0), 2, interpret=True)
_spoken_of: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


def current() -> Device | None:
    """Returns the GPU that is spoken of, else the first that JAX computes on; None if that is none."""
    if _spoken_of.get() is not None:
        return _spoken_of.get()
    device = jax.local_devices()[0]
    # AMD's have names such as gfx90a there.
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or found is None:
        return None
    return Device(
        (int(found[1]), int(found[2])), getattr(device, "core_count", None) or USUAL_CORES, device.device_kind
    )


def lacking(capability: tuple[int, int] = (8, 0), only: bool = False) -> str | None:
    """Returns why there is no GPU of this compute capability or a later one, or None; `only`: or of no later major one.

    What a kernel takes from its own generation, such as Hopper's wgmma, later ones need not have.
    """
    gpu = current()
    if gpu is None:
        return "it needs a CUDA device"
    if capability <= gpu.capability and not (only and gpu.capability[0] > capability[0]):
        return None
    needed, has = (".".join(map(str, pair)) for pair in (capability, gpu.capability))
    return f"it needs compute capability {needed}{' alone' if only else ''}, this device has {has}"


@contextlib.contextmanager
def speaking_of(device: Device) -> Iterator[None]:
    """Lets all that is traced inside be made for this device: compiled where there is none, or interpreted.

    What `jax.jit` has traced once keeps its device, inside and outside.
    """
    token = _spoken_of.set(device)
    try:
        yield
    finally:
        _spoken_of.reset(token)
