"""VQAv2 as its official evaluation counts it: soft accuracy, by type of answer and of question.

Source: https://github.com/GT-Vision-Lab/VQA, PythonEvaluationTools; arXiv:1612.00837.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmmjax.errors import InputError
from lmmjax.tasks.questions import Question, by_id, read_object
from lmmjax.tasks.sheet import Sheet, shares
from lmmjax.tasks.soft import one_line, plain_words, without_punctuation


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Returns each question's entry of the official annotations (v2_mscoco_val2014_annotations.json)."""
    if not files:
        raise InputError("--annotations: none given; expected VQAv2's annotations JSON")
    entries = {}
    for file in files:
        for entry in read_object(file, "annotations"):
            if not isinstance(entry, dict) or not entry.get("answers"):
                raise InputError(f'{file}: an annotation without "answers"; expected VQAv2\'s annotations JSON')
            entries[entry.get("question_id")] = entry
    return by_id(questions, entries, ", ".join(map(str, files)))


def judge(questions: Sequence[Question], truths: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> Sheet:
    """Returns the mean soft accuracy, over all and by type of answer (yes/no, number, other)."""
    marks = [mark(answer, truth["answers"]) for answer, truth in zip(answers, truths, strict=True)]
    return shares(marks, [str(truth.get("answer_type", "")) for truth in truths])


def mark(answer: str, people: Sequence[Mapping[str, Any]]) -> float:
    """Returns an answer's soft accuracy among people's.

    Answers are cleaned only where people disagree: if all wrote the same, a capital or a period is a mistake.
    """
    said = [{**one, "answer": one_line(one["answer"])} for one in people]
    answer = one_line(answer)
    if len({one["answer"] for one in said}) > 1:
        said = [{**one, "answer": _cleaned(one["answer"])} for one in said]
        answer = _cleaned(answer)
    # Others are those who differ in anything, their answer's number included; without numbers twins vanish together.
    agreeing = [sum(other["answer"] == answer for other in said if other != one) for one in said]
    return sum(min(1, count / 3) for count in agreeing) / len(said)


def _cleaned(text: str) -> str:
    return plain_words(without_punctuation(text))
