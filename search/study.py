"""The Optuna study: an append-only record of finished trials, and TPE's proposal as a function of it.

A trial enters the record in one write once it is finished, so a kill at any moment leaves no half trial and loses
none. What is tried next depends on the seed and on the record alone: a search that was killed and started again
goes exactly where an undisturbed one would have gone.
"""

import contextlib
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lmmjax.errors import InputError
from search.space import Params

NAME = "lmmjax"
STARTUP = 10
"""Trials, uniform ones included, before TPE has seen enough to model."""

Proposal = Callable[[Mapping[str, FloatDistribution], Sequence[FrozenTrial], int], Params]
Evaluate = Callable[[Params], "Outcome"]


class Outcome(NamedTuple):
    """What a trial is judged by (smaller is better), the point as it was projected, and what else to record."""

    value: float
    params: Params
    facts: dict[str, Any]


class Record:
    """The finished trials of one search, on disk."""

    def __init__(self, storage: BaseStorage, settings: Mapping[str, Any]):
        """Opens the record, or begins it.

        Raises:
            InputError: it belongs to a search with other settings, which are named.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(storage=storage, study_name=NAME, load_if_exists=True)
        known = self._study.user_attrs.get("settings")
        if known is None:
            self._study.set_user_attr("settings", dict(settings))
        elif differences := compare(known, settings):
            raise InputError(f"this search was begun with {differences}: give the same settings, or another --out")

    @property
    def trials(self) -> list[FrozenTrial]:
        """Returns the finished trials in the order in which they ended."""
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def add(self, outcome: Outcome, distributions: Mapping[str, FloatDistribution]) -> None:
        """Appends a finished trial, in one write."""
        self._study.add_trial(
            create_trial(
                params=dict(outcome.params),
                distributions=dict(distributions),
                value=outcome.value,
                user_attrs=outcome.facts,
            )
        )


def run(
    record: Record,
    distributions: Mapping[str, FloatDistribution],
    evaluate: Evaluate,
    *,
    trials: int,
    starts: Sequence[Params],
    propose: Proposal,
    seed: int,
) -> Iterator[FrozenTrial]:
    """Yields every new trial until the record holds `trials` of them: first the starts, then what is proposed."""
    while len(finished := record.trials) < trials:
        count = len(finished)
        point = starts[count] if count < len(starts) else propose(distributions, finished, seed)
        began = time.monotonic()
        outcome = evaluate(point)
        outcome.facts["seconds"] = round(time.monotonic() - began, 3)
        record.add(outcome, distributions)
        yield record.trials[-1]


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; pressed again, it interrupts at once."""
    pressed = False

    def handle(number, frame):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("\nstopping after this trial; press Ctrl-C again to quit at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def tpe(distributions: Mapping[str, FloatDistribution], finished: Sequence[FrozenTrial], seed: int) -> Params:
    """Returns the next point by a multivariate tree-structured Parzen estimator. Source: arXiv:2304.11127."""
    with warnings.catch_warnings():
        # Optuna 4 calls `multivariate` experimental; 5 has it by default.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=_seed(seed, len(finished)), multivariate=True, n_startup_trials=STARTUP
        )
    return _ask(sampler, distributions, finished)


def random(distributions: Mapping[str, FloatDistribution], finished: Sequence[FrozenTrial], seed: int) -> Params:
    """Returns the next point at random: what TPE has to beat."""
    return _ask(optuna.samplers.RandomSampler(seed=_seed(seed, len(finished))), distributions, finished)


def value(trial: FrozenTrial) -> float:
    """Returns a finished trial's value."""
    assert trial.value is not None
    return trial.value


def compare(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the settings that differ, in words; empty if none does.

    What an earlier version did not record differs, unless it is None: its trials may have been judged otherwise.
    """
    now = json.loads(json.dumps(now))
    names = sorted(name for name in known.keys() | now.keys() if known.get(name) != now.get(name))
    words = [f"{name} {known[name]!r} (now {now.get(name)!r})" for name in names if name in known]
    unsaid = [name for name in names if name not in known]
    return ", ".join(words + ([f"no record of {', '.join(unsaid)}"] if unsaid else []))


def _ask(sampler, distributions: Mapping[str, FloatDistribution], finished: Sequence[FrozenTrial]) -> Params:
    study = optuna.create_study(sampler=sampler)
    study.add_trials(finished)
    return study.ask(dict(distributions)).params


def _seed(seed: int, count: int) -> int:
    """Returns a seed of its own for every trial, so that a resumed search does not repeat its draws."""
    return int(np.random.SeedSequence([seed, count]).generate_state(1)[0])
