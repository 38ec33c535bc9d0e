"""Allocations of sparsity over layers: published rules of one pass, as baselines and as starts of a search.

A rule looks at the evidence and says which sparsity it wishes for each linear; the budget's projection then makes
exact counts of it, the same for all of them and for a search's candidates.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lmmjax.errors import InputError
from lmmjax.prune.allocations.alphapruning import alphapruning
from lmmjax.prune.allocations.das import das
from lmmjax.prune.allocations.ecoflap import ecoflap
from lmmjax.prune.allocations.evidence import Evidence
from lmmjax.prune.allocations.mgaa import mgaa
from lmmjax.prune.allocations.owl import owl
from lmmjax.prune.allocations.uniform import uniform
from lmmjax.prune.budget import WeightBudget

__all__ = ["ALLOCATIONS", "Allocation", "Evidence", "allocate", "wish"]


class Allocation(NamedTuple):
    """A rule from evidence to sparsities, which may lie outside of [0, 1], and what of the evidence it reads."""

    rule: Callable[[Evidence], Float[np.ndarray, "l 7"]]
    needs_layers: bool = False
    needs_statistics: bool = False
    needs_loss: bool = False


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform),
    "owl": Allocation(owl, needs_layers=True, needs_statistics=True),
    "alphapruning": Allocation(alphapruning, needs_layers=True),
    "ecoflap": Allocation(ecoflap, needs_layers=True, needs_loss=True),
    "das": Allocation(das, needs_statistics=True),
    "mgaa": Allocation(mgaa, needs_statistics=True),
}


def wish(name: str, evidence: Evidence) -> Float[np.ndarray, "l 7"]:
    """Returns the sparsity that an allocation wishes for each linear, cut to [0, 1]; near the budget, not on it.

    Raises:
        InputError: no allocation has this name, or the evidence lacks what it reads.
    """
    if name not in ALLOCATIONS:
        raise InputError(f"allocation: got {name!r}, expected one of {', '.join(ALLOCATIONS)}")
    allocation, layers, given = ALLOCATIONS[name], evidence.text.layers, len(evidence.statistics)
    if allocation.needs_statistics and given != layers:
        raise InputError(
            f"allocation {name}: got statistics of {given} layers, expected {layers}; calibrate all layers"
        )
    if allocation.needs_loss and evidence.loss is None:
        raise InputError(f"allocation {name}: got no loss, expected one of a layer's number and params")
    return np.clip(allocation.rule(evidence), 0, 1)


def allocate(name: str, evidence: Evidence, budget: WeightBudget | None = None) -> Int[np.ndarray, "l 7"]:
    """Returns inputs to drop of each linear: the allocation's wish on the exact budget.

    `budget` says how far a linear may be from the target, by default as far as it likes.

    Raises:
        InputError: as `wish`, or the budget is for another sparsity or another model than the evidence.
    """
    budget = budget or WeightBudget(evidence.text, evidence.keep, box=1.0)
    if abs(budget.keep - evidence.keep) > 1e-6 or budget.text != evidence.text:
        raise InputError(
            f"budget: got one that keeps {budget.keep:g} of its decoder, expected {evidence.keep:g} of the evidence's;"
            " make both for the same sparsity and the same model"
        )
    return budget.project(wish(name, evidence))
