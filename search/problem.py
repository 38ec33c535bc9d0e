"""One search's problem, made ready: the model, the three sets, the ranks, and what a point is worth."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmmjax import calibrate, data, weights
from lmmjax.checkpoint import Checkpoint, require_dense
from lmmjax.data import Encoded
from lmmjax.fold import fold_values
from lmmjax.likelihood import Result
from lmmjax.plan import Calibration, Plan
from lmmjax.prompt import Processor
from lmmjax.prune.transform import Ranks, apply_plan, rank_model
from search import comparison, sets
from search.comparison import Contender
from search.objective import OBJECTIVES, Evaluator
from search.settings import Settings
from search.space import Candidate, Params, Space
from search.study import Outcome


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is computed once. `evaluator` judges on the search set, in the order of `ranks`."""

    settings: Settings
    checkpoint: Checkpoint
    space: Space
    sets: sets.Sets
    statistics: tuple[calibrate.LayerStatistics, ...]
    ranks: Ranks
    evaluator: Evaluator
    batch: int

    def outcome(self, point: Params) -> Outcome:
        """Returns what a point is worth: the objective of the candidate on the budget that it stands for."""
        candidate = self.space.candidate(point)
        result = self.evaluator(candidate)
        facts: dict[str, Any] = {"kl": _number(result.kl), "nll": _number(result.nll), "accuracy": result.accuracy}
        facts |= {name: array.tolist() for name, array in candidate._asdict().items()}
        return Outcome(self.measure(result), self.space.encode(candidate), facts)

    @property
    def measure(self) -> Callable[[Result], float]:
        """The objective, made small; see `_number`."""
        of = OBJECTIVES[self.settings.objective]
        return lambda result: _number(of(result))

    def plan(self, candidate: Candidate) -> Plan:
        chosen = self.settings
        recipe = Calibration(chosen.data, chosen.calibration_samples, chosen.calibration_tokens, chosen.seed)
        return candidate.plan(score=chosen.score, calibration=recipe, cache=chosen.form)

    def compressed(self, candidate: Candidate):
        """Returns the params with the candidate's zeros in place, as it was judged."""
        return apply_plan(self.checkpoint.config, self.checkpoint.params, self.ranks, self.plan(candidate))

    def rank(self, score: str) -> Ranks:
        if score == self.settings.score:
            return self.ranks
        return rank_model(self.checkpoint.config, self.checkpoint.params, self.statistics, score)

    def report_evaluator(self) -> Evaluator:
        """Returns what judges on the report set, by the same rules."""
        model, chosen = self.checkpoint, self.settings
        encoded = encode(model, self.sets.report)
        return Evaluator(
            model.config, model.params, self.ranks, chosen.form, encoded, batch=self.batch, tokens=chosen.tokens
        )

    def compared(self, searched: Candidate) -> Iterator[tuple[Contender, Result]]:
        """Yields the searched allocation and its baselines with their results on the report set."""
        judge = self.report_evaluator()
        for contender in comparison.contenders(
            self.space, self.rank, searched, self.settings.score, self.evaluator, self.measure
        ):
            yield contender, judge(contender.candidate, contender.ranks)


def prepare(settings: Settings, checkpoint: Checkpoint, report_samples: int, batch: int) -> Problem:
    """Returns the problem of these settings on a dense checkpoint.

    Raises:
        InputError: the checkpoint is compressed already, a budget cannot be met, or there are too few samples.
    """
    require_dense(checkpoint.path, checkpoint.plan)
    if settings.form.rotate_values == "folded":
        checkpoint = dataclasses.replace(checkpoint, params=fold_values(checkpoint.config.text, checkpoint.params))
    config, params = checkpoint.config, checkpoint.params
    space = settings.space(config)
    taken = sets.take(
        settings.data, settings.calibration_samples, settings.search_samples, report_samples, settings.seed
    )
    calibrating = encode(checkpoint, taken.calibration)
    statistics = calibrate.statistics(config, params, calibrating, settings.calibration_tokens)
    ranks = rank_model(config, params, statistics, settings.score)
    searching = encode(checkpoint, taken.search)
    evaluator = Evaluator(config, params, ranks, settings.form, searching, batch=batch, tokens=settings.tokens)
    return Problem(settings, checkpoint, space, taken, statistics, ranks, evaluator, batch)


def encode(checkpoint: Checkpoint, samples: list[data.Sample]) -> Encoded:
    return data.encode(Processor.load(checkpoint.path, checkpoint.config), samples)


def fingerprint(problem: Problem) -> str:
    """Returns a short hash of the weights and of the questions searched on.

    Of the weights a part takes part, see `weights.digest`.
    """
    digest = weights.digest(problem.checkpoint.params)
    for sample in (*problem.sets.calibration, *problem.sets.search):
        digest.update(f"{Path(sample.image).name}\n{sample.question}\n{sample.answer}\n".encode())
    return digest.hexdigest()[:16]


def _number(value: float) -> float:
    """Returns the value, infinity in place of NaN: a plan that breaks the model is the worst, not the search's end."""
    return math.inf if math.isnan(value) else value
