"""Starts for the search from what `lmmjax.sensitivity` measured: the widths that hurt least within the bytes."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lmmjax import weights
from lmmjax.errors import InputError
from lmmjax.files import read_json
from lmmjax.kv_error import SIDES, WIDTHS
from lmmjax.llava import Params
from search.cache_budget import CacheBudget
from search.knapsack import Pair, knapsack, undominated
from search.settings import Settings
from search.space import Candidate, Space

MEASURES = {"loss_change": 1, "attention_error": 2}
"""What a start makes small the sum of, by its name in the file, and to which power: errors of independent layers add
up as squares do."""
UNMEASURED = ("window", "dtype", "quantize_prefill")
"""Fields of a cache's format that the rounding itself does not depend on."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What rounding one side of one layer hurts: per side a row a layer, a column each of `WIDTHS`."""

    keys: Float[np.ndarray, "l w"]
    values: Float[np.ndarray, "l w"]

    def hurt(self, side: str, layer: int, bits: int) -> float:
        """Returns what one width hurts; 16 bits are exact."""
        return 0.0 if bits == 16 else float(getattr(self, side)[layer, WIDTHS.index(bits)])


def load(path: Path, settings: Settings, params: Params, layers: int) -> list[Measured]:
    """Returns what a file of `lmmjax.sensitivity` says, by each of `MEASURES`, if it was measured for this search.

    Raises:
        InputError: no such file, or one of another model, cache format or data, or with nothing measured in it.
    """
    raw = read_json(path)
    try:
        _check_origin(path, raw["settings"], settings, params)
        found = [
            Measured(*(np.array(raw[name][side], float) ** power for side in SIDES)) for name, power in MEASURES.items()
        ]
        bits = tuple(raw["bits"])
    except (KeyError, TypeError) as error:
        raise InputError(f"--sensitivity: {path} is not of lmmjax.sensitivity's making ({error!r})") from error
    tables = [getattr(one, side) for one in found for side in SIDES]
    if bits != WIDTHS or any(table.shape != (layers, len(WIDTHS)) for table in tables):
        raise InputError(f"--sensitivity: {path} has not {layers} layers at each of {WIDTHS} bits; measure again")
    if not all((table > 0).all() for table in tables):
        raise InputError(
            f"--sensitivity: {path} has layers that nothing was rounded in, as its samples fill no group; measure with"
            " a smaller --group or longer questions"
        )
    return found


def starts(measured: Iterable[Measured], space: Space) -> list[Candidate]:
    """Returns by each measure the allocation that hurts least within the cache's budget, sparsity uniform.

    The knapsack is exact; bytes that it leaves over go to sides that `CacheBudget.project` picks, as in every start.
    Source: the allocation as an integer program over first-order changes, PM-KVQ, arXiv:2505.18610.
    """
    found = {digest(candidate): candidate for candidate in (_start(one, space) for one in measured)}
    return list(found.values())


def pairs(measured: Measured, cache: CacheBudget) -> list[list[Pair]]:
    """Returns every layer's pairs of widths that no other beats in both bytes and hurt, the smallest first.

    Source: KVTuner, arXiv:2502.04420 (its pruning within a layer).
    """
    return [undominated(_all_pairs(measured, cache, layer)) for layer in range(cache.text.layers)]


def digest(*candidates: Candidate) -> str:
    """Returns a short hash of widths: a search that is resumed must have the starts that it was begun with."""
    found = hashlib.sha256()
    for candidate in candidates:
        found.update(np.concatenate([candidate.key_bits, candidate.value_bits]).tobytes())
    return found.hexdigest()[:8]


def _start(measured: Measured, space: Space) -> Candidate:
    cache = space.cache
    chosen = knapsack(pairs(measured, cache), math.floor(cache.keep * cache.dense_bytes + 1e-6))
    keys, values = (np.array([getattr(pair, side) for pair in chosen], np.int32) for side in ("key_bits", "value_bits"))
    wishes = cache.encode("keys", keys), cache.encode("values", values)
    return Candidate(space.weights.uniform(), *cache.project(*wishes))


def _all_pairs(measured: Measured, cache: CacheBudget, layer: int) -> Sequence[Pair]:
    return [
        Pair(
            key_bits,
            value_bits,
            cache.side_bytes["keys"][key_bits] + cache.side_bytes["values"][value_bits],
            measured.hurt("keys", layer, key_bits) + measured.hurt("values", layer, value_bits),
        )
        for key_bits in cache.widths["keys"]
        for value_bits in cache.widths["values"]
    ]


def _check_origin(path: Path, origin: dict[str, Any], settings: Settings, params: Params) -> None:
    """Raises InputError unless a file was measured on these weights, in this cache format and on calibration's data."""
    if origin["weights"] != weights.digest(params).hexdigest()[:16]:
        raise InputError(
            f"--sensitivity: {path} was measured on another model ({origin['model']}); measure this one by"
            " python -m lmmjax.sensitivity"
        )
    formats = (origin["cache"], dataclasses.asdict(settings.form))
    measured, ours = ({**form, **dict.fromkeys(UNMEASURED)} for form in formats)
    for name in {**measured, **ours}:
        if measured.get(name) != ours.get(name):
            raise InputError(
                f"--sensitivity: {path} was measured with {name} {measured.get(name)!r}, the search's cache has"
                f" {ours.get(name)!r}; give the same to both"
            )
    data, seed, most = settings.data, settings.seed, settings.calibration_samples
    if (origin["data"], origin["seed"]) != (data, seed) or origin["samples"] > most:
        raise InputError(
            f"--sensitivity: {path} was measured on {origin['samples']} samples of {origin['data']}, seed"
            f" {origin['seed']}, which may be among those searched on; expected at most {most} of {data}, seed {seed}"
        )
