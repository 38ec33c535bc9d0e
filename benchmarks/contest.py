"""Who stands in the quality tables, and what judges them: statistics once a seed, programs compiled once for all.

Weights are pruned under a dense cache and caches quantized under dense weights, so that a table shows one loss. All
scores take the dense model's one-shot statistics, as the search does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.search import search
from lmmjax import perplexity
from lmmjax.cache import empty_search_cache
from lmmjax.checkpoint import Checkpoint
from lmmjax.perplexity import Window
from lmmjax.plan import BITS, CacheFormat
from lmmjax.prune.budget import WeightBudget
from lmmjax.prune.masks import keep_n_of_m
from lmmjax.prune.transform import Ranks, rank_model
from search import problem, sets, study
from search.objective import Evaluator, pruned
from search.problem import Problem
from search.settings import Settings
from search.space import Candidate, dense

WINDOWS = 4
"""Windows of text judged at once."""


class Cell(NamedTuple):
    """A figure of a table. `level` is a sparsity ("0.5"), a pattern ("2:4"), bits ("4"), or empty for dense."""

    axis: str
    level: str
    method: str
    seed: int


class Contestant(NamedTuple):
    """An allocation, the order in which its weights go, and what there is to say of its size and search."""

    candidate: Candidate
    ranks: Ranks
    facts: dict[str, Any]


class Sizes(NamedTuple):
    """Questions to take statistics on, to judge a trial by, and to report on; trials of a search."""

    calibration: int
    search: int
    samples: int
    trials: int


def cells(sparsity: Sequence[str], bits: Sequence[int], seeds: int) -> list[Cell]:
    """Returns all cells, the most telling first: a run that is cut off has left tables of one seed.

    2:4 and the narrowest cache leave a search nothing to choose.
    """
    found = [Cell("dense", "", "dense", 0)]
    for seed in range(seeds):
        if not seed:
            found += [Cell("weights", level, "magnitude", 0) for level in sparsity]
            found += [Cell("cache", str(width), "uniform", 0) for width in bits]
        found += [Cell("weights", level, name, seed) for name in ("wanda", "lognorm") for level in sparsity]
        found += [Cell("weights", level, "searched", seed) for level in sparsity if ":" not in level]
        found += [Cell("cache", str(width), "searched", seed) for width in bits if width > min(BITS)]
    return found


class Contest:
    """Measures cells on one model; the questions and the windows of text are the same for all."""

    def __init__(self, model: Checkpoint, sizes: Sizes, windows: Sequence[Window], context: int, batch: int = 16):
        self._model, self._sizes, self._batch = model, sizes, batch
        self._windows, self._width = windows, perplexity.padded(context)
        # The latest only: ranks are as many numbers as the model has weights.
        self._of_seed = functools.lru_cache(1)(self._prepare)
        self._ranks = functools.lru_cache(1)(self._rank)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's quality, size and search."""
        candidate, ranks, facts = self._contestant(cell)
        result = self._of_seed(cell.seed)[1](candidate, ranks)
        quality = {"right": result.accuracy, "by_kind": result.by_kind, "kl": _finite(result.kl)}
        if self._windows:
            quality["ppl"] = _finite(self._perplexity(candidate, ranks))
        return {**cell._asdict(), **quality, **facts}

    def _contestant(self, cell: Cell) -> Contestant:
        nothing = dense(self._model.config.text.layers)
        if cell.axis == "dense":
            return Contestant(nothing, self._of_seed(cell.seed)[0].ranks, {})
        return self._pruned(cell, nothing) if cell.axis == "weights" else self._quantized(cell, nothing)

    def _pruned(self, cell: Cell, nothing: Candidate) -> Contestant:
        if cell.method == "searched":
            chosen = self._under(cell.seed, 1 - float(cell.level), 1.0)
            best, facts = search(chosen, study.tpe, self._sizes.trials)
            return Contestant(best, chosen.ranks, {"kept": chosen.space.weights.kept(best.drops), **facts})
        ranks = self._ranks(cell.seed, cell.method, cell.level if ":" in cell.level else "")
        if ":" in cell.level:
            # These ranks are 0 and 1, and what is below 1 goes.
            return Contestant(nothing._replace(drops=np.ones_like(nothing.drops)), ranks, {})
        budget = WeightBudget(self._model.config.text, 1 - float(cell.level))
        return Contestant(nothing._replace(drops=budget.uniform()), ranks, {"kept": budget.kept(budget.uniform())})

    def _quantized(self, cell: Cell, nothing: Candidate) -> Contestant:
        whole = self._of_seed(cell.seed)[0]
        widths = np.full(len(nothing.key_bits), int(cell.level))
        nbytes = whole.space.cache.nbytes(widths, widths)
        if cell.method == "searched":
            chosen = self._under(cell.seed, 1.0, nbytes / whole.space.cache.dense_bytes)
            best, facts = search(chosen, study.tpe, self._sizes.trials)
            taken = chosen.space.cache.nbytes(best.key_bits, best.value_bits)
            return Contestant(best, whole.ranks, {"kv_bytes": taken, **facts})
        return Contestant(nothing._replace(key_bits=widths, value_bits=widths), whole.ranks, {"kv_bytes": nbytes})

    def _under(self, seed: int, keep: float, kv_keep: float) -> Problem:
        """Returns a seed's problem under other budgets."""
        whole = self._of_seed(seed)[0]
        settings = dataclasses.replace(whole.settings, budget=keep, kv_budget=kv_keep)
        return dataclasses.replace(whole, settings=settings, space=settings.space(self._model.config))

    def _prepare(self, seed: int) -> tuple[Problem, Evaluator]:
        """Returns a seed's problem, and what judges by the report set, which is that of seed 0."""
        model, sizes = self._model, self._sizes
        settings = Settings(
            model=model.path.name,
            budget=0.5,
            kv_budget=1.0,
            context=model.config.text.context,
            calibration_samples=sizes.calibration,
            search_samples=sizes.search,
            seed=seed,
        )
        chosen = problem.prepare(settings, model, sizes.samples, self._batch)
        report = sets.take(settings.data, sizes.calibration, sizes.search, sizes.samples, seed=0).report
        chosen = dataclasses.replace(chosen, sets=dataclasses.replace(chosen.sets, report=report))
        return chosen, chosen.report_evaluator()

    def _rank(self, seed: int, score: str, pattern: str) -> Ranks:
        chosen = self._of_seed(seed)[0]
        if not pattern:
            return chosen.rank(score)
        n, m = map(int, pattern.split(":"))
        return rank_model(self._model.config, self._model.params, chosen.statistics, score, _kept(n, m))

    def _perplexity(self, candidate: Candidate, ranks: Ranks) -> float:
        config, params = self._model.config, pruned(self._model.params, ranks, candidate.drops)
        keys, values = jnp.asarray(candidate.key_bits), jnp.asarray(candidate.value_bits)
        cache = empty_search_cache(config.text, CacheFormat(), keys, values, WINDOWS, self._width)
        parts = perplexity.score_in(config, params, cache, self._windows, self._width)
        return perplexity.gather(list(parts)).ppl


def _kept(n: int, m: int) -> Callable:
    """Returns what makes ranks of scores that are 1 where N of M stay, and 0 elsewhere."""
    return lambda score: keep_n_of_m(score, n, m).astype(jnp.uint16)


def _finite(value: float) -> float | None:
    """Returns the value, or None where it is no number that JSON has."""
    return value if math.isfinite(value) else None
