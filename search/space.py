"""The variables of the search: a sparsity a group of linears, and key and value widths a layer."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from optuna.distributions import FloatDistribution

from lmmjax.config import LINEARS
from lmmjax.errors import InputError
from lmmjax.linears import named
from lmmjax.plan import LayerPlan, Plan
from lmmjax.prune.budget import WeightBudget
from search.cache_budget import CacheBudget

Params = dict[str, float]
"""A point of the space by variable name, as Optuna holds it."""


class Candidate(NamedTuple):
    """An allocation on the budget: inputs dropped per layer and linear, bits per layer and side."""

    drops: Int[np.ndarray, "l 7"]
    key_bits: Int[np.ndarray, "l"]
    value_bits: Int[np.ndarray, "l"]

    def plan(self, **settings: Any) -> Plan:
        """Returns the Plan of this allocation; `settings` are the Plan's other fields."""
        layers = (LayerPlan(int(keys), int(values), named(drops)) for drops, keys, values in zip(*self, strict=True))
        return Plan(tuple(layers), **settings)


def dense(layers: int) -> Candidate:
    """Returns the allocation that compresses nothing."""
    bits = np.full(layers, 16, np.int32)
    return Candidate(np.zeros((layers, len(LINEARS)), np.int32), bits, bits)


@dataclasses.dataclass(frozen=True)
class Space:
    """Every point is a wish; `candidate` projects it onto both budgets.

    `blocks` says which linears share a sparsity: "layer", "linear" (one a layer and linear), or a number of
    contiguous blocks of layers. A width is a real number, since the projection ranks wishes; see CacheBudget.
    A budget of 1 leaves nothing to choose, so its variables do not exist.
    """

    weights: WeightBudget
    cache: CacheBudget
    blocks: str = "layer"

    def __post_init__(self):
        layers = self.weights.text.layers
        if self.blocks in ("layer", "linear"):
            return
        if not (self.blocks.isdecimal() and 1 <= int(self.blocks) <= layers):
            raise InputError(f"--blocks: got {self.blocks!r}, expected layer, linear or a number from 1 to {layers}")

    @functools.cached_property
    def groups(self) -> Int[np.ndarray, "l 7"]:
        """The index of the sparsity variable that each linear follows."""
        layers = np.arange(self.weights.text.layers)
        if self.blocks == "linear":
            return layers[:, None] * len(LINEARS) + np.arange(len(LINEARS))
        count = len(layers) if self.blocks == "layer" else int(self.blocks)
        return np.repeat((layers * count // len(layers))[:, None], len(LINEARS), axis=1)

    @functools.cached_property
    def sparsity_names(self) -> list[str]:
        if self.weights.low == self.weights.high or self.weights.keep == 1:
            return []
        if self.blocks == "linear":
            return [f"sparsity.{layer}.{name}" for layer in range(self.weights.text.layers) for name in LINEARS]
        return [f"sparsity.{group}" for group in range(self.groups.max() + 1)]

    @functools.cached_property
    def distributions(self) -> dict[str, FloatDistribution]:
        """Returns Optuna's description of every variable."""
        sparsity = (self.weights.low, self.weights.high)
        found = {name: FloatDistribution(*sparsity) for name in self.sparsity_names}
        if self.cache.keep < 1:
            for side, prefix in (("keys", "key_width"), ("values", "value_width")):
                steps = len(self.cache.widths[side]) - 1
                if steps:
                    found |= {f"{prefix}.{i}": FloatDistribution(0, steps) for i in range(self.cache.text.layers)}
        return found

    def candidate(self, params: Mapping[str, float]) -> Candidate:
        """Returns the allocation on the budget that this point stands for."""
        values = np.array([params[name] for name in self.sparsity_names])
        wish = values[self.groups] if len(values) else np.full(self.groups.shape, 1 - self.weights.keep)
        widths = (self._widths(params, "key_width"), self._widths(params, "value_width"))
        return Candidate(self.weights.project(wish), *self.cache.project(*widths))

    def encode(self, candidate: Candidate) -> Params:
        """Returns the point that stands for an allocation; groups take the mean of their linears."""
        drops, key_bits, value_bits = candidate
        weights = self.weights
        size = weights.inputs * weights.outputs
        dropped = np.bincount(self.groups.ravel(), (drops * weights.outputs).ravel().astype(float))
        ratio = np.clip(dropped / np.bincount(self.groups.ravel(), size.ravel()), weights.low, weights.high)
        keys, values = self.cache.encode("keys", key_bits), self.cache.encode("values", value_bits)
        point = dict(zip(self.sparsity_names, ratio.tolist(), strict=False))
        point |= {f"key_width.{i}": level for i, level in enumerate(keys.tolist())}
        point |= {f"value_width.{i}": level for i, level in enumerate(values.tolist())}
        return {name: point[name] for name in self.distributions}

    def uniform(self) -> list[Candidate]:
        """Returns the candidates that treat all layers alike, one a pair of widths that fits, slack filled."""
        layers = self.weights.text.layers
        starts = []
        for key_bits, value_bits in self.cache.uniform():
            keys, values = np.full(layers, key_bits), np.full(layers, value_bits)
            wishes = self.cache.encode("keys", keys), self.cache.encode("values", values)
            starts.append(Candidate(self.weights.uniform(), *self.cache.project(*wishes)))
        return starts

    def _widths(self, params: Mapping[str, float], prefix: str) -> Float[np.ndarray, "l"]:
        return np.array([params.get(f"{prefix}.{i}", 0.0) for i in range(self.cache.text.layers)])
