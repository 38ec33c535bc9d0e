"""Exact match: right is the whole stripped text and nothing else. easy-VQA, and any JSONL that has answers."""

from collections.abc import Sequence
from pathlib import Path

from lmmjax.errors import InputError
from lmmjax.files import read_jsonl
from lmmjax.tasks.questions import Question, by_id
from lmmjax.tasks.sheet import Sheet, shares


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[str]:
    """Returns the "answer" of each question's own line, or of the annotations' line with its id."""
    if files:
        given = {row.get("question_id"): row for file in files for _, row in read_jsonl(file)}
        lines = by_id(questions, given, ", ".join(map(str, files)))
    else:
        lines = [question.line for question in questions]
    answers = [line.get("answer") for line in lines]
    for question, answer in zip(questions, answers, strict=True):
        if not isinstance(answer, str):
            raise InputError(f'question {question.id!r}: "answer" is {answer!r}, expected a text to match')
    return [str(answer) for answer in answers]


def judge(questions: Sequence[Question], truths: Sequence[str], answers: Sequence[str]) -> Sheet:
    """Returns the share of answers that match, over all and by category."""
    marks = [answer.strip() == truth.strip() for answer, truth in zip(answers, truths, strict=True)]
    return shares(marks, [question.category for question in questions])
