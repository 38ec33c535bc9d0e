"""POPE as LLaVA counts it: is an object there? Accuracy, precision, recall, F1 and the share of yes, by category.

Source: LLaVA, llava/eval/eval_pope.py; arXiv:2305.10355.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmjax.errors import InputError
from lmmjax.files import read_jsonl
from lmmjax.tasks.questions import Question
from lmmjax.tasks.sheet import Figures, Sheet, Sums

PREFIX = "coco_pope_"


def truths(questions: Sequence[Question], files: Sequence[Path]) -> list[bool]:
    """Returns whether yes is right: from coco_pope_CATEGORY.json files, or from the questions' own "label".

    Labels are matched as published: within a category by order. Where both sides name the image it must be one.
    """
    labels = {file.stem.removeprefix(PREFIX): iter([row for _, row in read_jsonl(file)]) for file in files}
    found = []
    for question in questions:
        line: Any = next(labels.get(question.category, iter(())), {}) if files else question.line
        label = line.get("label", line.get("answer"))
        if not isinstance(label, str):
            raise InputError(
                f"question {question.id!r}: no label for category {question.category!r}; expected"
                f" {PREFIX}CATEGORY.json files with as many lines as questions, or a label in the question's line"
            )
        if "image" in line and "image" in question.line and line["image"] != question.line["image"]:
            raise InputError(
                f"question {question.id!r}: its image is {question.line['image']}, the label's {line['image']}; labels"
                " are matched by order, so both files must have the same"
            )
        found.append(label != "no")
    return found


def judge(questions: Sequence[Question], truths: Sequence[bool], answers: Sequence[str]) -> Sheet:
    """Returns the figures over all categories (F1 as their mean, as papers report it), then by category."""
    said = np.array([says_yes(answer) for answer in answers], bool)
    truth, of = np.asarray(truths, bool), np.array([question.category for question in questions])
    columns = {}
    categories = sorted(set(of.tolist()))
    for category in categories:
        mine = of == category
        columns |= {
            f"tp {category}": mine & said & truth,
            f"fp {category}": mine & said & ~truth,
            f"tn {category}": mine & ~said & ~truth,
            f"fn {category}": mine & ~said & truth,
        }
    return Sheet({name: column.astype(float) for name, column in columns.items()}, lambda sums: _all(sums, categories))


def says_yes(answer: str) -> bool:
    """Returns whether an answer counts as yes: everything does that has no "no", "No" or "not" before its period."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _all(sums: Sums, categories: Sequence[str]) -> Figures:
    parts = {
        category: _figures(*(sums[f"{cell} {category}"] for cell in ("tp", "fp", "tn", "fn")))
        for category in categories
    }
    right, count = (
        sum(sums[f"{cell} {category}"] for category in categories for cell in cells)
        for cells in (("tp", "tn"), ("tp", "fp", "tn", "fn"))
    )
    f1 = sum(part["f1"] for part in parts.values()) / len(parts)
    whole: Figures = {"f1": np.asarray(f1), "accuracy": np.asarray(right / count)}
    named = {f"{name}: {category}": value for category in categories for name, value in parts[category].items()}
    return parts[""] if categories == [""] else whole | named


def _figures(tp: np.ndarray, fp: np.ndarray, tn: np.ndarray, fn: np.ndarray) -> Figures:
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    count = tp + fp + tn + fn
    return {
        "f1": 2 * precision * recall / (precision + recall),
        "accuracy": (tp + tn) / count,
        "precision": precision,
        "recall": recall,
        "yes ratio": (tp + fp) / count,
    }
