"""Which of a source's tensors fills which weight, and every reason why one does not."""

from collections.abc import Iterable, Mapping

import numpy as np

from convert import DTYPES
from convert.names import EMBEDDING, LM_HEAD, Shape, Slot, canonical, slots, spelled
from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError


def assign(config: LlavaConfig, found: Mapping[str, tuple[Shape, str]]) -> dict[str, str]:
    """Returns {slot's name: the source's name} of every weight; `found` is the source's {name: (shape, dtype)}.

    With tied embeddings a second copy, as lm_head, may be there too.

    Raises:
        InputError: a tensor without a place, a weight without a tensor, two for one, a wrong shape or dtype;
            one message names them all.
    """
    wanted = {slot.name: slot.shape for slot in slots(config)}
    missing = set(wanted)
    if config.text.tied:
        wanted[spelled(config, LM_HEAD)] = wanted[spelled(config, EMBEDDING)]
    chosen: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for name, (shape, dtype) in found.items():
        known = canonical(name)
        if known is None:
            continue
        hub = spelled(config, known)
        if hub not in wanted:
            problems.setdefault("tensors without a place", []).append(name)
        elif hub in chosen:
            problems.setdefault("second tensors for one weight", []).append(f"{name} beside {chosen[hub]}")
        elif shape != wanted[hub]:
            problems.setdefault("wrong shapes", []).append(f"{name} is {shape}, expected {wanted[hub]}")
        elif dtype not in DTYPES:
            problems.setdefault("dtypes not handled", []).append(f"{name} is {dtype}")
        if hub in wanted:
            chosen.setdefault(hub, name)
    if missing := sorted(missing - set(chosen)):
        problems["missing tensors"] = missing
    if problems:
        raise InputError(f"the weights do not fit config.json: {_listed(problems)}")
    return chosen


def checked(slot: Slot, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Returns a tensor in our layout, cast to `dtype` if one is given, contiguous.

    Raises:
        InputError: it holds NaN or infinities, or would after the cast.
    """
    if not _finite(array):
        raise InputError(f"{slot.name} holds NaN or infinite weights; the source is damaged")
    with np.errstate(over="ignore"):  # told below, as an error
        cast = array if dtype is None else array.astype(dtype)
    if cast is not array and not _finite(cast):
        raise InputError(f"{slot.name} holds weights too large for {dtype}; choose bfloat16 or float32")
    return np.ascontiguousarray(slot.to_ours(cast))


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


def _listed(problems: Mapping[str, list[str]], most: int = 10) -> str:
    def few(names: Iterable[str], count: int) -> str:
        return ", ".join(list(names)[:most]) + (f" and {count - most} more" if count > most else "")

    return "; ".join(f"{len(names)} {title}: {few(names, len(names))}" for title, names in problems.items())
