"""VQAv2 as LLaVA reports it: answers cleaned by M4C's rules first, then counted by the official evaluation.

Source: LLaVA, scripts/convert_vqav2_for_submission.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lmmjax.tasks import vqav2
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import Sheet
from lmmjax.tasks.soft import m4c

truths = vqav2.truths


def judge(questions: Sequence[Question], truths: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Sheet:
    """Returns the official figures of the cleaned answers."""
    return vqav2.judge(questions, truths, [m4c(answer) for answer in answers])
