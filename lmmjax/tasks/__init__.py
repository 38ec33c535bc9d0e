"""Benchmarks: what is asked, what is right, and how the published evaluators count it. One file a benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lmmjax.tasks import exact, mme, pope, scienceqa, textvqa, vqav2, vqav2_llava
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import Sheet


class Scorer(Protocol):
    """What every benchmark's module offers."""

    def truths(self, questions: Sequence[Question], files: Sequence[Path]) -> list[Any]:
        """Returns what is right for each question, from the question's line or from annotation files.

        Raises:
            InputError: a question's truth is missing, or a file is not of the benchmark's format.
        """
        ...

    def judge(self, questions: Sequence[Question], truths: Sequence[Any], answers: Sequence[str]) -> Sheet:
        """Returns the answers' marks and the published figures over them."""
        ...


SCORERS: Mapping[str, Scorer] = {
    "exact": exact,
    "vqav2": vqav2,
    "vqav2-llava": vqav2_llava,
    "textvqa": textvqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "mme": mme,
}
