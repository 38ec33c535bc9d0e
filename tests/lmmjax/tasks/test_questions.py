"""Question files: what is read, what is refused and how, and the images of the controls."""

import json
from pathlib import Path

import pytest

from lmmjax.errors import InputError
from lmmjax.tasks import questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(path: Path, *rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_lines_are_read_in_order_under_either_name(folder: Path):
    one = write(folder / "1.jsonl", {"question_id": "x", "image": "a.png", "text": "why?", "category": "k"})
    two = write(folder / "2.jsonl", {"image": "b.png", "question": "who?", "answer": "I"}, {"image": None, "text": "?"})
    first, second, third = questions.read([one, two])
    assert (first.id, first.image, first.text, first.category) == ("x", folder / "a.png", "why?", "k")
    assert (second.id, second.text, second.line["answer"]) == (0, "who?", "I")
    assert (third.id, third.image) == (1, None)


def test_scienceqas_conversations_become_llavas_prompts(folder: Path):
    rows = [
        {"id": "3", "conversations": [{"value": "Why?\n(A) x\n<image>"}], "image": "a.png"},
        {"id": "4", "conversations": [{"value": "Who?"}]},
    ]
    (folder / "sqa.json").write_text(json.dumps(rows))
    shown, blind = questions.read([folder / "sqa.json"])
    assert shown.text == f"<image>\nWhy?\n(A) x\n{questions.OPTION_LETTER}"
    assert blind.text == f"Who?\n{questions.OPTION_LETTER}"
    assert questions.shown([shown], "none")[0].text == f"Why?\n(A) x\n{questions.OPTION_LETTER}"


BAD = {
    'line 1: no "image"': '{"text": "?"}',
    "'d.png' is not in": '{"image": "d.png", "text": "?"}',
    '"text" is None': '{"image": null}',
    "line 2: no JSON": '{"image": null, "text": "?"}\n{',
    "no JSON object (list)": "[]",
    "nothing in it": "\n",
    '"category" 3': '{"image": null, "text": "?", "category": 3}',
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_wrong_is_said_with_its_line(says: str, folder: Path):
    (folder / "q.jsonl").write_text(BAD[says])
    with pytest.raises(InputError) as error:
        questions.read([folder / "q.jsonl"])
    assert says in str(error.value)


def test_shuffled_every_question_sees_another_image(folder: Path):
    rows = [{"image": f"{name}.png", "text": "?"} for name in "aabbc"] + [{"image": None, "text": "?"}]
    own = questions.read([write(folder / "q.jsonl", *rows)])
    other = questions.shown(own, "shuffled", seed=3)
    assert all(one.image != two.image for one, two in zip(own[:5], other[:5], strict=True))
    assert other[0].image == other[1].image
    assert {question.image for question in other} == {question.image for question in own}
    assert other == questions.shown(own, "shuffled", seed=3)
    with pytest.raises(InputError, match=r"1 image\(s\), expected at least 2"):
        questions.shown(own[:2], "shuffled")


def test_easy_vqa_is_its_test_split_by_type():
    asked = questions.easy_vqa()
    assert len(asked) == 9673
    assert {question.category for question in asked} == {"yes/no", "shape", "colour"}
