"""MME as its own tool counts it: two yes-or-no questions an image; acc over questions, acc+ over images.

Source: https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, eval_tool; arXiv:2306.13394.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmmjax.errors import InputError
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import Figures, Sheet, Sums

TOTALS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
_INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


class Truth(NamedTuple):
    """An image by category and name, and whether yes is right."""

    category: str
    image: str
    yes: bool


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[Truth]:
    """Returns what is right: from the folder MME_Benchmark_release_version, or from the questions' own "answer".

    Category and image are the parts of LLaVA's question ids, such as "code_reasoning/0020.png".
    """
    said = _folder(files[0]) if files else {}
    found = []
    for question in questions:
        parts = str(question.id).split("/")
        category, image = question.category or parts[0], parts[-1].split(".")[0]
        label = said.get((category, image, _core(question.text))) if files else question.line.get("answer")
        if str(label).lower() not in ("yes", "no"):
            raise InputError(
                f"question {question.id!r}: its answer is {label!r}; expected yes or no, see --annotations"
            )
        found.append(Truth(category, image, str(label).lower() == "yes"))
    return found


def judge(questions: Sequence[Question], truths: Sequence[Truth], answers: Sequence[str]) -> Sheet:
    """Returns perception and cognition (sums over their categories of acc + acc+, in percent), and each category's.

    Raises:
        InputError: an image that has not two questions.
    """
    right: dict[tuple[str, str], list[bool]] = {}
    for answer, truth in zip(answers, truths, strict=True):
        marks = right.setdefault((truth.category, truth.image), [])
        marks.append(label(answer) == ("yes" if truth.yes else "no"))
    alone = next((image for image, marks in right.items() if len(marks) != 2), None)
    if alone is not None:
        raise InputError(f"mme: image {'/'.join(alone)} has {len(right[alone])} question(s), expected 2; see --limit")
    of = np.array([category for category, _ in right])
    marks = np.array(list(right.values()), float)
    columns, categories = {}, list(dict.fromkeys(of.tolist()))
    for category in categories:
        mine = (of == category).astype(float)
        columns |= {
            f"images {category}": mine,
            f"right {category}": mine * marks.sum(1),
            f"both {category}": mine * marks.all(1),
        }
    return Sheet(columns, lambda sums: _figures(sums, categories))


def label(answer: str) -> str:
    """Returns yes, no or other: the answer in lower case, else what its first four letters hold, yes first."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _figures(sums: Sums, categories: Sequence[str]) -> Figures:
    each: Figures = {}
    for category in categories:
        images = sums[f"images {category}"]
        acc, both = 50 * sums[f"right {category}"] / images, 100 * sums[f"both {category}"] / images
        each |= {f"score: {category}": acc + both, f"acc: {category}": acc, f"acc+: {category}": both}
    totals: Figures = {}
    for name, members in TOTALS.items():
        scores = [each[f"score: {category}"] for category in members if category in categories]
        if scores:
            totals[name] = np.sum(scores, axis=0)
    return totals | each


def _folder(folder: Path) -> dict[tuple[str, str, str], str]:
    """Returns the answers in NAME.txt files, which stand beside the images or in questions_answers_YN/."""
    found = {}
    for file in sorted({*folder.glob("*/*.txt"), *folder.glob("*/questions_answers_YN/*.txt")}):
        category = file.relative_to(folder).parts[0]
        for line in file.read_text(encoding="utf-8").splitlines():
            question, tab, answer = line.strip().partition("\t")
            if tab:
                found[category, file.stem, _core(question)] = answer
    if not found:
        raise InputError(
            f"--annotations: {folder} has no */*.txt with questions; expected MME_Benchmark_release_version"
        )
    return found


def _core(question: str) -> str:
    """Returns a question without instructions and double spaces, in which MME and LLaVA differ."""
    for instruction in _INSTRUCTIONS:
        question = question.replace(instruction, "")
    return " ".join(question.split())
