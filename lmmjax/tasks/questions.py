"""Questions of a benchmark: easy-VQA's, LLaVA's question JSONL, or ScienceQA's conversations; and control images."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmjax import data
from lmmjax.errors import InputError, is_unicode
from lmmjax.files import read_jsonl

IMAGES = ("own", "shuffled", "none")
"""Which image a question is shown with: its own; another question's; or none, which asks blindly."""

PLACEHOLDER = "<image>"
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA appends to every ScienceQA question (its option `single-pred-prompt`)."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question; `line` is all that its file says, where a benchmark's truth may stand too."""

    id: str | int
    image: Path | None
    text: str
    category: str = ""
    line: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def easy_vqa() -> list[Question]:
    """Returns easy-VQA's test questions, their type as category."""
    return [
        Question(index, sample.image, sample.question, sample.kind, {"answer": sample.answer})
        for index, sample in enumerate(data.load(data.EASY_VQA, "test"))
    ]


def read(files: Sequence[Path], image_folder: Path | None = None) -> list[Question]:
    """Returns the questions of files, one after the other, in their order.

    A .json file holds ScienceQA's conversations as LLaVA converts them; any other is JSONL: {"question_id",
    "image", "text"[, "category"]}, also under the names "question" and "kind". Images are in `image_folder`, by
    default the file's own; null means that there is none. Ids need not be unique: TextVQA's and MME's are not.

    Raises:
        InputError: no such file, no question, or a line that lacks something (file and line are named).
    """
    questions = []
    for file in files:
        folder = image_folder or file.parent
        if file.suffix == ".json":
            questions += [_conversation(f"{file}, entry {i}", row, folder) for i, row in enumerate(_entries(file))]
        else:
            rows = enumerate(read_jsonl(file))
            questions += [_question(where, row, index, folder) for index, (where, row) in rows]
    return questions


def shown(questions: Sequence[Question], images: str, seed: int = 0) -> list[Question]:
    """Returns the questions with the images that IMAGES names.

    Shuffled, the images go round a seeded circle: every question sees another question's image, never its own, and
    two questions on one image still share one.

    Raises:
        InputError: there is only one image to shuffle.
    """
    if images == "own":
        return list(questions)
    if images == "none":
        return [
            dataclasses.replace(question, image=None, text=question.text.replace(PLACEHOLDER, "").strip())
            for question in questions
        ]
    paths = list(dict.fromkeys(question.image for question in questions if question.image is not None))
    if len(paths) < 2:
        raise InputError(f"--images shuffled: the questions have {len(paths)} image(s), expected at least 2")
    order = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    return [
        question if question.image is None else dataclasses.replace(question, image=other[question.image])
        for question in questions
    ]


def by_id(questions: Sequence[Question], truths: Mapping[Any, Any], where: object) -> list[Any]:
    """Returns each question's truth by its id; raises InputError that names the first id without one."""
    missing = next((question.id for question in questions if question.id not in truths), None)
    if missing is not None:
        raise InputError(f"--annotations: {where} has nothing on question {missing!r}; expected all that are asked")
    return [truths[question.id] for question in questions]


def read_object(file: Path, key: str | None = None) -> Any:
    """Returns the object in a JSON file, or what stands under a key of it; raises InputError if there is nothing."""
    content = _json(file)
    if not isinstance(content, dict) or key not in {None, *content}:
        raise InputError(f"{file}: no object with {key or 'anything'} in it; is this the benchmark's annotation file?")
    return content if key is None else content[key]


def _question(where: str, row: Mapping[str, Any], index: int, folder: Path) -> Question:
    text, category = row.get("text", row.get("question")), row.get("category", row.get("kind", ""))
    identity = row.get("question_id", index)
    if "image" not in row:
        raise InputError(f'{where}: no "image"; expected a file name, or null for a question about none')
    if not isinstance(text, str) or not text.strip() or not is_unicode(text):
        raise InputError(f'{where}: "text" is {text!r}, expected a question')
    if not isinstance(identity, str | int) or not isinstance(category, str):
        raise InputError(f'{where}: "question_id" is {identity!r} and "category" {category!r}; expected plain values')
    return Question(identity, _image(where, row["image"], folder), text, category, row)


def _conversation(where: str, row: Any, folder: Path) -> Question:
    try:
        asked = row["conversations"][0]["value"].replace(PLACEHOLDER, "").strip()
        identity = row["id"]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise InputError(f'{where}: expected {{"id", "conversations": [{{"value"}}, ...][, "image"]}}') from None
    image = _image(where, row.get("image"), folder)
    text = f"{asked}\n{OPTION_LETTER}"
    return Question(identity, image, text if image is None else f"{PLACEHOLDER}\n{text}", line=row)


def _image(where: str, name: Any, folder: Path) -> Path | None:
    if name is None:
        return None
    if not isinstance(name, str) or not (folder / name).is_file():
        raise InputError(f"{where}: image {name!r} is not in {folder}; give the folder with --image-folder")
    return folder / name


def _entries(file: Path) -> list[Any]:
    content = _json(file)
    if not isinstance(content, list) or not content:
        raise InputError(f"{file}: got no list of conversations; expected ScienceQA's, as LLaVA converts it, or JSONL")
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
