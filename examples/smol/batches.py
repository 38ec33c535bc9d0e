"""Which images, questions and texts a step learns from: a function of (seed, step), as resuming demands."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from examples.smol.learning import Rows, answers_at
from examples.vqa.packing import Pack
from lmmjax import perplexity
from lmmjax.data import KINDS
from lmmjax.errors import InputError
from lmmjax.prompt import Processor

RARE = 0.1
"""Weight of the questions that a stage is not about: yes/no questions while the model learns to name what it sees,
for guessing answers most of them; open questions, once it can, while it learns to compare that with a question."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """So many steps on so many images, each with so many questions; the name says of which kind."""

    name: str
    steps: int
    rows: int
    questions: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """`text` is one long run of tokens, of which each step reads a window."""

    data: Pack
    text: Int[np.ndarray, "n"]
    window: int
    stages: Sequence[Stage]
    seed: int

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Returns the stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step {step} behind the last stage")

    def __call__(self, step: int) -> tuple[Rows, Int[np.ndarray, "1 t"]]:
        rng = np.random.default_rng((self.seed, step))
        stage = self.stage(step)
        images = rng.choice(len(self.data.shown), stage.rows, replace=False)
        chosen = self.data.draw(rng, images, stage.questions, self._weights(stage))
        start = rng.integers(len(self.text) - self.window)
        return rows(self.data, images, chosen), self.text[None, start : start + self.window]

    def _weights(self, stage: Stage) -> Float[np.ndarray, "n"]:
        """Returns how often each question is drawn, by what a stage is about."""
        is_yes_no = self.data.kinds == KINDS.index("yes/no")
        return np.where(is_yes_no == (stage.name == "match"), 1.0, RARE) * self.data.surprise


def rows(data: Pack, images: Int[np.ndarray, "r"], chosen: Int[np.ndarray, "r q"]) -> Rows:
    """Returns whole sequences of these questions about these images."""
    tokens, is_answer = data.tokens(chosen)
    at, counted = answers_at(is_answer, len(data.prefix))
    return Rows(*map(jnp.asarray, (data.shown[images], tokens, at, counted)))


def read_text(processor: Processor, files: Sequence[Path], window: int) -> Int[np.ndarray, "n"]:
    """Returns the tokens of all files, one behind the other.

    Raises:
        InputError: a file cannot be read, or all have fewer tokens than a window takes.
    """
    ids = np.array([token for each in perplexity.read(processor, files) for token in each], np.int32)
    if len(ids) <= window:
        raise InputError(f"--texts: {len(ids)} tokens, expected more than the --window of {window}")
    return ids
