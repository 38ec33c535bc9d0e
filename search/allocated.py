"""Starts for the search from published allocations of sparsity over layers, with the uniform widths that fit."""

from collections.abc import Sequence

from lmmjax.errors import InputError
from lmmjax.layered import held
from lmmjax.prune.allocations import Evidence, allocate
from search.problem import Problem
from search.settings import ALLOCATIONS
from search.space import Candidate


def read(given: str | None) -> tuple[str, ...]:
    """Returns the names in "owl,mgaa".

    Raises:
        InputError: one is unknown, or wants more of the model than a search has at hand.
    """
    names = tuple(given.split(",")) if given else ()
    if unknown := [name for name in names if name not in ALLOCATIONS]:
        raise InputError(f"--allocations: got {unknown[0]!r}, expected some of {','.join(ALLOCATIONS)}")
    return names


def starts(problem: Problem, names: Sequence[str]) -> list[Candidate]:
    """Returns a candidate a name, its sparsities within the search's box and on its budget."""
    if not names:
        return []
    model, space = problem.checkpoint, problem.space
    whole = held(model.config, model.params)
    evidence = Evidence(model.config.text, 1 - space.weights.keep, whole.layer, problem.statistics)
    alike = space.uniform()[0]
    return [alike._replace(drops=allocate(name, evidence, space.weights)) for name in names]
