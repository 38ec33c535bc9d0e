"""Samples from both sources, subsets that share no image, and the arrays a model is given."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmmjax.data import Sample, disjoint, encode, load
from lmmjax.errors import InputError


def test_easy_vqa_has_the_published_sizes_and_kinds():
    train, test = load("easy-vqa", "train"), load("easy-vqa", "test")
    assert (len(train), len(test)) == (38575, 9673)
    assert Counter(sample.kind for sample in test) == {"yes/no": 7136, "shape": 1257, "colour": 1280}
    assert len({sample.image for sample in train}) == 4000
    assert not {sample.image for sample in train} & {sample.image for sample in test}
    assert all(sample.image.is_file() for sample in test[:50])


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split is 'dev'; expected one of train, test"):
        load("easy-vqa", "dev")


def write_lines(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(b"")
    path = folder / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_images_are_relative_to_the_file_and_text_is_a_question(tmp_path):
    path = write_lines(
        tmp_path,
        {"image": "a.png", "question": "what?", "answer": "red", "kind": "colour"},
        "",
        {"image": "a.png", "text": "who?", "answer": "me"},
    )
    image = tmp_path / "a.png"
    assert load(str(path), "test") == [Sample(image, "what?", "red", "colour"), Sample(image, "who?", "me", "any")]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "line 2: no JSON"),
        ([1], "line 2: no JSON object"),
        ({"image": "a.png", "answer": "x"}, "line 2: question is None"),
        ({"image": "a.png", "question": "q", "answer": 3}, "line 2: answer is 3"),
        ({"image": "a.png", "question": "q", "answer": "\ud800"}, "line 2: answer holds half a character"),
        ({"image": "b.png", "question": "q", "answer": "x"}, "b.png' does not exist"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, row, complaint):
    path = write_lines(tmp_path, {"image": "a.png", "question": "q", "answer": "x"}, row)
    with pytest.raises(InputError, match=complaint):
        load(str(path), "train")


def test_a_missing_an_empty_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected 'easy-vqa' or a JSONL file that exists"):
        load(str(tmp_path / "no.jsonl"), "train")
    with pytest.raises(InputError, match="nothing in it"):
        load(str(write_lines(tmp_path)), "train")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load(str(tmp_path / "x.jsonl"), "train")


def samples_of(questions: list[int]) -> list[Sample]:
    """As many questions for image i as questions[i] says."""
    return [Sample(Path(f"{i}.png"), f"q{q}", "a", "any") for i, n in enumerate(questions) for q in range(n)]


@given(st.lists(st.integers(1, 4), min_size=6, max_size=30), st.integers(0, 9), st.data())
def test_subsets_share_no_image_and_use_one_question_an_image_while_they_last(questions, seed, data):
    first = data.draw(st.integers(0, len(questions)))
    second = data.draw(st.integers(0, len(questions) - first))
    subsets = disjoint(samples_of(questions), (first, second), seed)
    assert [len(subset) for subset in subsets] == [first, second]
    images = [sample.image for subset in subsets for sample in subset]
    assert len(set(images)) == len(images)


def test_more_questions_than_images_still_share_no_image():
    subsets = disjoint(samples_of([3] * 10), (12, 12), seed=0)
    images = [{sample.image for sample in subset} for subset in subsets]
    assert [len(subset) for subset in subsets] == [12, 12]
    assert not images[0] & images[1]
    assert all(len(set(subset)) == 12 for subset in subsets)


def test_the_seed_alone_decides():
    samples = samples_of([2] * 50)
    assert disjoint(samples, (10, 10), 3) == disjoint(samples, (10, 10), 3)
    assert disjoint(samples, (10, 10), 3) != disjoint(samples, (10, 10), 4)


def test_too_few_images_or_questions_are_refused():
    with pytest.raises(InputError, match="2 images, too few for subsets of"):
        disjoint(samples_of([5, 5]), (1, 1, 1), 0)
    with pytest.raises(InputError, match="only 2 questions; 3 were asked for"):
        disjoint(samples_of([2]), (3,), 0)
    with pytest.raises(InputError, match="none below 0"):
        disjoint(samples_of([2]), (-1,), 0)


class Bytes:
    """A stand-in processor: one token a byte, an image of one token (256), 0 as the end."""

    eos = (0,)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(text.encode()))

    def __init__(self, context: int = 100):
        self.config = SimpleNamespace(text=SimpleNamespace(context=context))
        self.read: list[Path] = []

    def render(self, question, images, system=None):
        return f"{question}:"

    def encode(self, text, images):
        return [256] * images + list(text.encode())

    def pixels(self, images):
        self.read += images
        return np.stack([np.full((3, 2, 2), int(Path(image).stem), np.float32) for image in images])


def test_encode_marks_answer_and_end_and_reads_each_image_once():
    processor = Bytes()
    samples = [Sample(Path(f"{i}.png"), q, a, k) for i, q, a, k in [(4, "ab", "x", "u"), (7, "c", "yes", "v")]]
    encoded = encode(processor, [*samples, samples[0]])  # pyright: ignore[reportArgumentType]
    assert encoded.kinds == ("u", "v", "u")
    assert processor.read == [Path("4.png"), Path("7.png")]
    np.testing.assert_array_equal(encoded.pixels[:, 0, 0, 0], [4, 7, 4])
    for row, (prompt, answer) in enumerate([("ab:", " x"), ("c:", " yes")]):
        whole = [256, *prompt.encode(), *answer.encode(), 0]
        assert encoded.lengths[row] == len(whole)
        assert encoded.tokens[row, : len(whole)].tolist() == whole
        marked = encoded.tokens[row][encoded.is_answer[row]]
        assert marked.tolist() == [*answer.encode(), 0]


def test_prompt_and_answer_fit_the_context_together():
    sample = Sample(Path("4.png"), "ab", "x", "any")  # an image, "ab:", " x" and the end: 7 tokens
    encode(Bytes(context=7), [sample])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="7 tokens of prompt and answer do not fit the model's context of 6"):
        encode(Bytes(context=6), [sample])  # pyright: ignore[reportArgumentType]
