"""Several questions of an image in one sequence, so that its image tokens are paid for once.

A sequence is a prefix (the prompts' beginning and the image) and blocks of equal length. A block sees the prefix
and itself, and its positions follow the prefix: each question is answered as if it were alone.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from lmmjax.data import KINDS, Sample, answer_ids
from lmmjax.errors import InputError
from lmmjax.prompt import Processor

Shares = dict[tuple[str, str], float]
"""The share of each (question, answer) among all answers to the same question text."""
PAD = 0
"""Any id will do: nothing sees what fills a block up."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Questions as blocks, what is shown of each image, and which blocks belong to it (-1 fills a row up).

    `shown` is what the trained model begins with: pixels, or features of a frozen tower. `surprise` is one over
    the share of this answer to this text: drawn in proportion to it, the questions cannot be answered better than
    by chance without a look at the image.
    """

    prefix: Int[np.ndarray, "x"]
    blocks: Int[np.ndarray, "n l"]
    is_answer: Bool[np.ndarray, "n l"]
    kinds: Int[np.ndarray, "n"]
    surprise: Float[np.ndarray, "n"]
    members: Int[np.ndarray, "i m"]
    shown: Float[np.ndarray, "i ..."]

    def rows(self, questions: int) -> tuple[Int[np.ndarray, "r"], Int[np.ndarray, "r q"]]:
        """Returns every question exactly once: the image of each sequence, and its questions."""
        each = -(-self.members.shape[1] // questions)
        filled = np.pad(self.members, ((0, 0), (0, each * questions - self.members.shape[1])), constant_values=-1)
        chosen = filled.reshape(-1, questions)
        used = (chosen >= 0).any(1)
        return np.repeat(np.arange(len(self.members)), each)[used], chosen[used]

    def draw(
        self, rng: np.random.Generator, images: Int[np.ndarray, "r"], questions: int, weights: Float[np.ndarray, "n"]
    ) -> Int[np.ndarray, "r q"]:
        """Returns questions of these images, without replacement, in proportion to their weights."""
        members = self.members[images]
        # The largest of log-weights plus Gumbel noise are a weighted sample without replacement.
        keys = np.log(weights[members]) + rng.gumbel(size=members.shape)
        keys[members < 0] = -np.inf
        return np.take_along_axis(members, np.argsort(-keys, axis=1)[:, :questions], axis=1)

    def tokens(self, chosen: Int[np.ndarray, "r q"]) -> tuple[Int[np.ndarray, "r t"], Bool[np.ndarray, "r q l"]]:
        """Returns whole sequences, and which tokens of the blocks are to be predicted."""
        real = (chosen >= 0)[..., None]
        blocks = np.where(real, self.blocks[chosen], PAD).reshape(len(chosen), -1)
        prefix = np.broadcast_to(self.prefix, (len(chosen), len(self.prefix)))
        return np.concatenate([prefix, blocks], axis=1), self.is_answer[chosen] & real


def layout(prefix: int, block: int, questions: int) -> tuple[Int[np.ndarray, "t"], Bool[np.ndarray, "t t"]]:
    """Returns positions and attention mask, the same for every sequence."""
    owner = np.concatenate([np.full(prefix, -1), np.repeat(np.arange(questions), block)])
    positions = np.concatenate([np.arange(prefix), np.tile(np.arange(prefix, prefix + block), questions)])
    visible = (owner[:, None] == owner) | (owner == -1)
    return positions, visible & np.tri(len(owner), dtype=bool)


def images_of(samples: Sequence[Sample]) -> list[Path]:
    """Returns the images in the order in which they first appear."""
    return list(dict.fromkeys(sample.image for sample in samples))


def pack(processor: Processor, samples: Sequence[Sample], shares: Shares, shown: Float[np.ndarray, "i ..."]) -> Pack:
    """Returns the samples packed; `shown` goes with `images_of(samples)`."""
    prefix, blocks, is_answer = _blocks(processor, samples)
    members: dict = {}
    for index, sample in enumerate(samples):
        members.setdefault(sample.image, []).append(index)
    most = max(map(len, members.values()))
    return Pack(
        prefix=prefix,
        blocks=blocks,
        is_answer=is_answer,
        kinds=np.array([KINDS.index(sample.kind) for sample in samples]),
        surprise=np.array([1 / shares.get((sample.question, sample.answer), 1.0) for sample in samples]),
        members=np.array([each + [-1] * (most - len(each)) for each in members.values()]),
        shown=shown,
    )


def hold_out(samples: Sequence[Sample], images: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples of all but so many images, and those of the rest."""
    names = images_of(samples)
    held = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:images]}
    return [s for s in samples if s.image not in held], [s for s in samples if s.image in held]


def answer_shares(samples: Sequence[Sample]) -> Shares:
    """Returns how often each answer is the right one, given nothing but the question's text."""
    pairs = Counter((sample.question, sample.answer) for sample in samples)
    texts = Counter(sample.question for sample in samples)
    return {pair: count / texts[pair[0]] for pair, count in pairs.items()}


def _blocks(processor: Processor, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the common prefix, and what follows it in each prompt together with answer and end."""
    texts = [processor.render(sample.question, 1) for sample in samples]
    prompts = [processor.encode(text, 1) for text in texts]
    answers = [answer_ids(processor, text, sample.answer) for text, sample in zip(texts, samples, strict=True)]
    image = processor.config.image_token
    assert image is not None, "questions about images are packed for a model that sees"
    start = len(prompts[0]) - prompts[0][::-1].index(image)
    if any(prompt[:start] != prompts[0][:start] for prompt in prompts):
        raise InputError("chat template: the prompts differ before the image's end; expected the image before the text")
    whole = [[*prompt[start:], *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, whole))
    ends = np.array([[len(block)] for block in whole])
    starts = ends - np.array([[len(answer)] for answer in answers])
    position = np.arange(length)
    blocks = np.array([block + [PAD] * (length - len(block)) for block in whole])
    return np.array(prompts[0][:start]), blocks, (position >= starts) & (position < ends)
