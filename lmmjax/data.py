"""Questions about images: where they come from, how they are split, and how they become arrays."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lmmjax.errors import InputError, is_unicode
from lmmjax.files import read_jsonl

if TYPE_CHECKING:
    from lmmjax.prompt import Processor

EASY_VQA = "easy-vqa"
SPLITS = ("train", "test")
KINDS = ("yes/no", "shape", "colour")
"""easy-VQA's types of question, told apart by their answers."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one image, its whole answer, and the type it is reported under."""

    image: Path
    question: str
    answer: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Samples as right-padded arrays. `is_answer` marks the tokens to be predicted: the answer and its end.

    `pixels` are one image's a sample, or None for text alone.
    """

    tokens: Int[np.ndarray, "b t"]
    lengths: Int[np.ndarray, "b"]
    is_answer: Bool[np.ndarray, "b t"]
    pixels: Float[np.ndarray, "b c y x"] | None
    kinds: tuple[str, ...]

    def pixels_of(self, rows: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n c y x"] | None:
        """Returns the images of some samples."""
        return None if self.pixels is None else self.pixels[rows]


def located(spec: str) -> str:
    """Returns what `load` takes in a form that means the same from every directory: paths absolute."""
    return spec if spec == EASY_VQA else str(Path(spec).resolve())


def load(spec: str, split: str) -> list[Sample]:
    """Returns the samples of "easy-vqa" or of a JSONL file, in their stored order.

    A JSONL line is {"image", "question" or "text", "answer"[, "kind"]}, image paths relative to the file. Such
    a file knows no splits: either name returns all of it, and `disjoint` keeps calibration and report apart.

    Raises:
        InputError: an unknown split, no such file, or a line that lacks something (file and line are named).
    Source: easy-VQA, https://github.com/vzhou842/easy-VQA.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    return _easy_vqa(split) if spec == EASY_VQA else _jsonl(Path(spec))


def disjoint(samples: Sequence[Sample], counts: Sequence[int], seed: int) -> tuple[list[Sample], ...]:
    """Returns random subsets of these sizes that share no image.

    While the images last every sample has its own; beyond that each subset gets images in proportion to its
    size and goes round them, so that no image has two questions more than another that still had some left.

    Raises:
        InputError: a negative count, or too few images or questions.
    """
    rng = np.random.default_rng(seed)
    by_image: dict[Path, list[Sample]] = {}
    for index in rng.permutation(len(samples)):
        by_image.setdefault(samples[index].image, []).append(samples[index])
    ends = np.cumsum(_images_each(len(by_image), counts))
    images = list(by_image.values())
    return tuple(
        _round_robin(images[start:end], count) for start, end, count in zip((0, *ends[:-1]), ends, counts, strict=True)
    )


def encode(processor: "Processor", samples: Sequence[Sample]) -> Encoded:
    """Returns prompt, answer and end-of-sequence token of every sample, with its image's pixels.

    Images used several times are read once.

    Raises:
        InputError: prompt and answer are longer than the model's context, or an image cannot be read.
    """
    from lmmjax.prompt import bucket, pad  # transformers comes with it, and loading questions needs none

    texts = [processor.render(sample.question, 1) for sample in samples]
    prompts = [processor.encode(text, 1) for text in texts]
    answers = [answer_ids(processor, text, sample.answer) for text, sample in zip(texts, samples, strict=True)]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    context = processor.config.text.context
    for sample, ids in zip(samples, whole, strict=True):
        if len(ids) > context:
            raise InputError(
                f"data: {len(ids)} tokens of prompt and answer do not fit the model's context of {context}"
                f" ({sample.question[:40]!r}); shorten them"
            )
    tokens, lengths = pad(whole, bucket(max(map(len, whole), default=0)))
    starts = np.array([len(prompt) for prompt in prompts])
    index = np.arange(tokens.shape[1])
    images = list(dict.fromkeys(sample.image for sample in samples))
    rows = {image: row for row, image in enumerate(images)}
    return Encoded(
        tokens=tokens,
        lengths=lengths,
        is_answer=(index >= starts[:, None]) & (index < lengths[:, None]),
        pixels=processor.pixels(images)[[rows[sample.image] for sample in samples]],
        kinds=tuple(sample.kind for sample in samples),
    )


def batches(samples: int, size: int) -> Iterator[tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]]:
    """Yields the rows of each batch of `size`, and which are real: the last sample fills up the last batch."""
    for start in range(0, samples, size):
        rows = np.arange(start, start + size)
        yield np.minimum(rows, samples - 1), rows < samples


def answer_ids(processor: "Processor", prompt: str, answer: str) -> list[int]:
    """Returns the tokens that answer a rendered prompt, and the end of the sequence.

    Behind a prompt that ends in a word ("ASSISTANT:") a space comes first: it belongs to the answer's first token.
    """
    space = "" if prompt[-1:].isspace() else " "
    return [*processor.tokenizer.encode(f"{space}{answer}", add_special_tokens=False), processor.eos[0]]


def _easy_vqa(split: str) -> list[Sample]:
    import easy_vqa

    questions, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [
        Sample(Path(paths[image]), question, answer, _kind(answer))
        for question, answer, image in zip(questions, answers, images, strict=True)
    ]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return KINDS[0]
    return KINDS[1] if answer in ("circle", "rectangle", "triangle") else KINDS[2]


def _jsonl(path: Path) -> list[Sample]:
    if not path.is_file():
        raise InputError(f"data is {str(path)!r}; expected {EASY_VQA!r} or a JSONL file that exists")
    return [_sample(path.parent, where, row) for where, row in read_jsonl(path)]


def _sample(folder: Path, where: str, row: dict[str, Any]) -> Sample:
    def wrong(what: str) -> InputError:
        return InputError(f'{where}: {what}; expected {{"image": ..., "question": ..., "answer": ...}}')

    values = {
        "image": row.get("image"),
        "question": row.get("question", row.get("text")),
        "answer": row.get("answer"),
        "kind": row.get("kind", "any"),
    }
    for name, value in values.items():
        if not isinstance(value, str) or not value:
            raise wrong(f"{name} is {value!r}")
        if not is_unicode(value):
            raise wrong(f"{name} holds half a character ({value!r})")
    image = folder / values["image"]
    if not image.is_file():
        raise wrong(f"image {str(image)!r} does not exist")
    return Sample(image, values["question"], values["answer"], values["kind"])


def _images_each(images: int, counts: Sequence[int]) -> list[int]:
    """Returns how many images each subset may use: its own count while they last, else its fair share."""
    wanted = sum(counts)
    if any(count < 0 for count in counts):
        raise InputError(f"counts are {list(counts)}; expected none below 0")
    each = list(counts) if wanted <= images else [images * count // wanted for count in counts]
    if any(count and not share for count, share in zip(counts, each, strict=True)):
        raise InputError(f"the data have {images} images, too few for subsets of {list(counts)} that share none")
    return each


def _round_robin(images: Sequence[Sequence[Sample]], count: int) -> list[Sample]:
    """Returns `count` samples: the first of every image, then the second of each that has one, and so on."""
    rounds = max(map(len, images), default=0)
    order = [image[turn] for turn in range(rounds) for image in images if turn < len(image)]
    if len(order) < count:
        raise InputError(f"{len(images)} images have only {len(order)} questions; {count} were asked for")
    return order[:count]
