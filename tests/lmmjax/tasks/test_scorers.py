"""The scorers, on answers whose marks were obtained by running the published evaluators (quirks included).

The whole of both sides was compared on some hundred thousand generated answers as well, without a difference.
"""

import json
import math
from pathlib import Path

import pytest

from lmmjax.errors import InputError
from lmmjax.tasks import SCORERS, Question, exact, mme, pope, scienceqa, soft, textvqa, vqav2

CLEANED = [  # what is said, cleaned by the official evaluation, by M4C's
    ("Yes.", "yes", "yes"),
    ("a Dog", "dog", "dog"),
    ("two dogs, one cat", "2 dogs 1 cat", "2 dogs 1 cat"),
    ("1,000 - 2", "1000 2", "1000 2"),
    ("it's", "it's", "it 's"),
    ("dont", "don't", "don't"),
    ("couldntve", "couldntve", "couldntve"),
    ("couldnt've", "couldn't've", "couldn't've"),
    ("somebody'd", "somebodyd", "somebodyd"),
    ("U.S.A.", "usa", "usa"),
    ("3.5", "3.5", "3.5"),
    ("5.", "5", "5"),
    ("black-and-white", "black and white", "black and white"),
    ("left / right", "left right", "left right"),
    ("none", "0", "0"),
    ("the cat's toy?", "cat's toy", "cat 's toy"),
    ("10:30 a.m.", "10:30 am", "10:30 am"),
    ("t-shirt!", "t shirt", "t shirt"),
    ("An apple\nand\ttea", "apple and tea", "apple and tea"),
    ("." * 40, "." * 8, "." * 8),
    ("x,y", "x y", "xy"),
    ("1,,2 a-b", "1 2 b", "12 b"),
]
SOFT = [  # the answer, ten people's, its mark by the official evaluation, by M4C's
    ("Yes", ["yes"] * 10, 0.0, 1.0),
    ("Yes", ["yes"] * 9 + ["no"], 1.0, 1.0),
    ("no", ["yes"] * 9 + ["no"], 0.3, 0.3),
    ("2", ["two"] * 2 + ["three"] * 8, 0.6, 0.6),
    ("Two.", ["two"] * 3 + ["3"] * 7, 0.9, 0.9),
    ("cat", ["a cat"] * 4 + ["dog"] * 6, 1.0, 1.0),
    ("bird", ["cat"] * 5 + ["dog"] * 5, 0.0, 0.0),
]


def asked(count: int, **fields) -> list[Question]:
    return [Question(i, None, "what?", **fields) for i in range(count)]


@pytest.mark.parametrize(("said", "official", "m4c"), CLEANED)
def test_answers_are_cleaned_as_published(said: str, official: str, m4c: str):
    assert soft.plain_words(soft.without_punctuation(soft.one_line(said))) == official
    assert soft.m4c(said) == m4c


@pytest.mark.parametrize(("answer", "said", "official", "m4c"), SOFT)
def test_soft_accuracies_are_the_published_ones(answer: str, said: list[str], official: float, m4c: float):
    people = [{"answer": one, "answer_id": i} for i, one in enumerate(said)]
    assert vqav2.mark(answer, people) == pytest.approx(official)
    assert textvqa.judge(asked(1), [said], [answer]).values["accuracy"] == pytest.approx(m4c)
    by_llava = SCORERS["vqav2-llava"].judge(asked(1), [{"answers": people}], [answer])
    assert by_llava.values["accuracy"] == pytest.approx(max(official, m4c))


def test_people_without_numbers_vanish_with_their_twins():
    people = [{"answer": "dog", "answer_confidence": "yes"}] * 6 + [{"answer": "cat", "answer_confidence": "yes"}] * 4
    assert vqav2.mark("dog", people) == pytest.approx(0.4)


def test_vqav2_is_told_by_type_of_answer(tmp_path: Path):
    people = [{"answer": "2", "answer_id": i} for i in range(10)]
    kinds = ("number", "number", "other")
    entries = [{"question_id": i, "answer_type": kind, "answers": people} for i, kind in enumerate(kinds)]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"annotations": entries}))
    truths = vqav2.truths(asked(3), [file])
    values = vqav2.judge(asked(3), truths, ["2", "3", "2"]).values
    assert values == pytest.approx({"accuracy": 2 / 3, "accuracy: number": 0.5, "accuracy: other": 1.0})
    with pytest.raises(InputError, match="nothing on question 3"):
        vqav2.truths(asked(4), [file])


PROMPTS = {
    "What Is it?\nAnswer the question using a single word or phrase.": "what is it?",
    "Reference OCR token: A, B\nWhat is?\nAnswer": "what is?",
    "What?\nReference OCR token: X\nAnswer": "what?",
    "OCR tokens: A B Question: Who is? Short answer:": "who is?",
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_textvqa_finds_the_question_in_llavas_prompts(prompt: str, tmp_path: Path):
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text(
        json.dumps({"data": [{"image_id": "x", "question": PROMPTS[prompt].upper(), "answers": ["a"] * 10}]})
    )
    assert textvqa.truths([Question("x", None, prompt)], [file]) == [["a"] * 10]
    with pytest.raises(InputError, match="not a prompt of LLaVA's"):
        textvqa.asked("what?")


SAID = {
    "Yes, there is.": True, "No.": False, "There is no dog. Yes": False, "I cannot see it": True, "it is not": False,
    "NO": True, "nothing": True, "yes,no": True, "Is it? No, it is": False, "": True, "No\n": True, "a. no": True,
}  # fmt: skip


def test_pope_takes_everything_for_yes_that_has_no_no_in_its_first_sentence():
    assert {answer: pope.says_yes(answer) for answer in SAID} == SAID


def test_popes_figures(tmp_path: Path):
    """Those that the published evaluator prints for these answers, each category's labels matched by order."""
    labels = {"popular": ["yes", "yes", "no", "no", "yes"], "random": ["no", "yes"]}
    for category, each in labels.items():
        lines = [json.dumps({"label": label, "image": f"{i}.jpg"}) for i, label in enumerate(each)]
        (tmp_path / f"coco_pope_{category}.json").write_text("\n".join(lines))
    order = ["popular", "random", "popular", "popular", "popular", "random", "popular"]
    counted = {"popular": iter(range(5)), "random": iter(range(2))}
    questions = [Question(i, None, "?", of, {"image": f"{next(counted[of])}.jpg"}) for i, of in enumerate(order)]
    answers = ["Yes", "No", "no", "Yes", "not", "Yes", "Yes"]
    truths = pope.truths(questions, list(tmp_path.glob("*.json")))
    assert truths == [True, False, True, False, False, True, True]
    values = pope.judge(questions, truths, answers).values
    popular = {"f1": 2 / 3, "accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "yes ratio": 0.6}
    for name, value in popular.items():
        assert values[f"{name}: popular"] == pytest.approx(value)
    assert values["f1: random"] == values["accuracy: random"] == 1
    assert values["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert values["accuracy"] == pytest.approx(5 / 7)
    with pytest.raises(InputError, match="matched by order"):
        pope.truths(questions[::-1], list(tmp_path.glob("*.json")))
    with pytest.raises(InputError, match="no label for category 'adversarial'"):
        pope.truths(asked(1, category="adversarial"), list(tmp_path.glob("*.json")))


def test_pope_without_a_yes_has_no_precision():
    questions = asked(2, line={"label": "yes"})
    values = pope.judge(questions, pope.truths(questions, []), ["no", "no"]).values
    assert math.isnan(values["precision"])
    assert values["recall"] == 0


OPTIONS = {
    "A": 0, "B. a dog": 1, "C.": None, "C. ": 2, "D": None, "The answer is B.": 1, "so The answer is C!": 2,
    "The answer is B": None, "The answer is A. The answer is A.": None, "A. The answer is B.": 0, "a": None, "": None,
    "The answer is Z.": None, "AB": None, "FAILED": None,
}  # fmt: skip


def test_scienceqa_reads_options_as_published():
    assert {answer: scienceqa.option(answer, 3) for answer in OPTIONS} == OPTIONS


def test_scienceqas_figures(tmp_path: Path):
    problems = {
        "7": {"choices": ["x", "y"], "answer": 1, "subject": "natural science"},
        "9": {"choices": ["x", "y"], "answer": 0, "subject": "social science"},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    questions = [Question("9", None, "why?"), Question("7", None, "<image>\nwhy?")]
    truths = scienceqa.truths(questions, [tmp_path / "problems.json"])
    assert scienceqa.judge(questions, truths, ["B", "B. y"]).values == pytest.approx(
        {"accuracy": 0.5, "accuracy: natural science": 1, "accuracy: social science": 0, "accuracy: with image": 1}
    )


def test_mme_reads_yes_and_no_in_the_first_four_letters():
    said = {"Yes": "yes", "No.": "no", "Not sure": "no", "know": "no", "unknown": "other", "eyes": "yes", "I no": "no"}
    assert {answer: mme.label(answer) for answer in said} == said


def test_mmes_figures(tmp_path: Path):
    """acc of 2 + 2 + 0 right out of 6 is 66.7, acc+ of 2 images out of 3 is 66.7."""
    for name, category, folder in (("1", "count", ""), ("2", "count", ""), ("5", "artwork", "questions_answers_YN")):
        (tmp_path / category / folder).mkdir(parents=True, exist_ok=True)
        lines = f"Is it {name}? Please answer yes or no.\tYes\nIs it  9? Please answer yes or no.\tNo\n"
        (tmp_path / category / folder / f"{name}.txt").write_text(lines)

    def of(name: str, text: str) -> Question:
        return Question(name, None, f"{text}\nAnswer the question using a single word or phrase.")

    questions = [
        of("count/1.png", "Is it 1?"),
        of("count/1.png", "Is it 9?"),
        of("artwork/5.jpg", "Is it 5?"),
        of("count/2.png", "Is it 2? Please answer yes or no."),
        of("artwork/5.jpg", "Is it 9?"),
        of("count/2.png", "Is it 9?"),
    ]
    truths = mme.truths(questions, [tmp_path])
    assert [truth.yes for truth in truths] == [True, False, True, True, False, False]
    values = mme.judge(questions, truths, ["Yes", "No", "No", "yes", "no", "maybe"]).values
    assert values["perception"] == pytest.approx((75 + 50) + (50 + 0))
    assert values["acc: count"] == 75
    assert values["acc+: count"] == 50
    assert "cognition" not in values
    with pytest.raises(InputError, match=r"artwork/5 has 1 question\(s\), expected 2"):
        mme.judge(questions[:4], truths[:4], ["Yes"] * 4)
    with pytest.raises(InputError, match="its answer is None"):
        mme.truths([of("count/3.png", "Is it 1?")], [tmp_path])


def test_exact_match_is_the_whole_stripped_text(tmp_path: Path):
    questions = [Question(i, None, "?", kind, {"answer": "red"}) for i, kind in enumerate("aab")]
    truths = exact.truths(questions, [])
    values = exact.judge(questions, truths, [" red\n", "Red", "red"]).values
    assert values == pytest.approx({"accuracy": 2 / 3, "accuracy: a": 0.5, "accuracy: b": 1})
    (tmp_path / "answers.jsonl").write_text('{"question_id": 1, "answer": "x"}\n')
    assert exact.truths([questions[1]], [tmp_path / "answers.jsonl"]) == ["x"]
    with pytest.raises(InputError, match='"answer" is None'):
        exact.truths(asked(1), [])
