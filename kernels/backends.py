"""The ways to compute an op, in a table by name, and the choice of one for a call."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """A way to compute an op; `unsupported`, given the same call, says why it cannot, or None.

    `pays` says whether to take it without being asked for it.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    pays: Callable[..., bool] = lambda *_: True


def choose(name: str | None, backends: Mapping[str, Backend], task: str, *call: Any) -> str:
    """Returns the name of the backend that runs a call: `name` if it is given and able, else the first that can.

    Raises:
        ValueError: there is no such backend, or it cannot do the `task` (says why).
    """
    if name is None:
        return next(name for name, way in backends.items() if way.pays(*call) and way.unsupported(*call) is None)
    if name not in backends:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(backends)}")
    reason = backends[name].unsupported(*call)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot {task}: {reason}")
    return name
