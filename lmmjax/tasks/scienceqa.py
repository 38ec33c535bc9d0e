"""ScienceQA as LLaVA counts it: the letter of an option, over all, with an image, and by subject.

Source: LLaVA, llava/eval/eval_science_qa.py; arXiv:2209.09513.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmjax.errors import InputError
from lmmjax.tasks.questions import PLACEHOLDER, Question, by_id, read_object
from lmmjax.tasks.sheet import Figures, Sheet, Sums, shares

OPTIONS = "ABCDE"
_SENTENCE = re.compile("The answer is ([A-Z]).")


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Returns each question's entry of problems.json: "choices", "answer" (an index) and perhaps "subject"."""
    if not files:
        raise InputError("--annotations: none given; expected ScienceQA's problems.json")
    problems = {name: entry for file in files for name, entry in read_object(file).items()}
    found = by_id(questions, problems, ", ".join(map(str, files)))
    for question, entry in zip(questions, found, strict=True):
        if not isinstance(entry, dict) or not isinstance(entry.get("answer"), int) or not entry.get("choices"):
            raise InputError(f'question {question.id!r}: no "choices" and "answer" in problems.json')
    return found


def judge(questions: Sequence[Question], truths: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Sheet:
    """Returns the shares of right options: of all questions, of those with an image, and of each subject."""
    marks = [
        option(answer, len(truth["choices"])) == truth["answer"] for answer, truth in zip(answers, truths, strict=True)
    ]
    by_subject = shares(marks, [str(truth.get("subject", "")) for truth in truths])
    pictured = np.array([PLACEHOLDER in question.text for question in questions], float)
    columns = {**by_subject.columns, "pictured": pictured, "pictured marks": pictured * np.array(marks, float)}

    def figures(sums: Sums) -> Figures:
        return {**by_subject.figures(sums), "accuracy: with image": sums["pictured marks"] / sums["pictured"]}

    return Sheet(columns, figures)


def option(answer: str, choices: int) -> int | None:
    """Returns the index of the option that an answer names; None if it names none of so many choices.

    An answer is a letter, a letter with ". " and more, or has one sentence "The answer is X." (any last sign).
    """
    sentences = _SENTENCE.findall(answer)
    if answer in tuple(OPTIONS) or (answer[:1] in tuple(OPTIONS) and answer[1:3] == ". "):
        letter = answer[0]
    elif len(sentences) == 1:
        letter = sentences[0]
    else:
        return None
    index = OPTIONS.find(letter)
    return index if 0 <= index < choices else None
