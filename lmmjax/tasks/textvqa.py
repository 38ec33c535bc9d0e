"""TextVQA as LLaVA counts it: M4C's soft accuracy against ten people's answers.

Source: LLaVA, llava/eval/eval_textvqa.py and m4c_evaluator.py; arXiv:1904.08920.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lmmjax.errors import InputError
from lmmjax.tasks.questions import Question, read_object
from lmmjax.tasks.sheet import Sheet, shares
from lmmjax.tasks.soft import agreement, m4c

PEOPLE = 10


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[list[str]]:
    """Returns ten people's answers to each question, from TextVQA_0.5.1_val.json.

    The ids of LLaVA's question file are images', so an entry is found by image and the question in the prompt.
    """
    if not files:
        raise InputError("--annotations: none given; expected TextVQA_0.5.1_val.json")
    people = {
        (entry.get("image_id"), str(entry.get("question")).lower()): entry.get("answers")
        for file in files
        for entry in read_object(file, "data")
    }
    found = []
    for question in questions:
        key = (question.id, asked(question.text))
        answers = people.get(key)
        if not isinstance(answers, list) or len(answers) != PEOPLE:
            raise InputError(f"--annotations: question {key} has no {PEOPLE} answers there; is it the right file?")
        found.append([str(answer) for answer in answers])
    return found


def judge(questions: Sequence[Question], truths: Sequence[Sequence[str]], answers: Sequence[str]) -> Sheet:
    """Returns the mean soft accuracy."""
    marks = [
        agreement(m4c(answer), [m4c(one) for one in people]) for answer, people in zip(answers, truths, strict=True)
    ]
    return shares(marks, [question.category for question in questions])


def asked(prompt: str) -> str:
    """Returns the question inside a prompt of LLaVA's, in lower case: recognized text and instructions left out.

    Raises:
        InputError: the prompt is of none of LLaVA's four forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        inside = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        if inside:
            return inside[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise InputError(f"question {prompt[:60]!r}: not a prompt of LLaVA's TextVQA; expected question and instruction")
