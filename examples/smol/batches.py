"""Which images, questions and texts a step learns from: a function of (seed, step), as resuming demands."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from examples.smol.learning import Rows, answers_at
from examples.vqa.packing import Pack
from lmmjax.data import KINDS
from lmmjax.prompt import Processor

OPEN = 0.1
"""Weight of a yes/no question while the model learns to name what it sees: guessing answers most of them."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """So many steps on so many images, each with so many questions."""

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

    def stage(self, step: int) -> tuple[Stage, float]:
        """Returns the stage that a step belongs to, and how much of it is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        raise IndexError(f"step {step} behind the last stage")

    def __call__(self, step: int) -> tuple[Rows, Int[np.ndarray, "1 t"]]:
        rng = np.random.default_rng((self.seed, step))
        stage, done = self.stage(step)
        images = rng.choice(len(self.data.shown), stage.rows, replace=False)
        chosen = self.data.draw(rng, images, stage.questions, self._weights(stage, done))
        start = rng.integers(len(self.text) - self.window)
        return rows(self.data, images, chosen), self.text[None, start : start + self.window]

    def _weights(self, stage: Stage, done: float) -> Float[np.ndarray, "n"]:
        """Surprising answers first; at the end all questions alike, as they will be asked."""
        surprise = self.data.surprise
        if stage.name != "answer":
            return np.where(self.data.kinds == KINDS.index("yes/no"), OPEN * surprise, surprise)
        return surprise if done < 0.5 else np.ones_like(surprise)


def rows(data: Pack, images: Int[np.ndarray, "r"], chosen: Int[np.ndarray, "r q"]) -> Rows:
    """Returns whole sequences of these questions about these images."""
    tokens, is_answer = data.tokens(chosen)
    at, counted = answers_at(is_answer, len(data.prefix))
    return Rows(*map(jnp.asarray, (data.shown[images], tokens, at, counted)))


def read_text(processor: Processor, files: Sequence[Path]) -> Int[np.ndarray, "n"]:
    """Returns the tokens of all files, one behind the other."""
    ids = [processor.tokenizer.encode(file.read_text(), add_special_tokens=False) for file in files]
    return np.concatenate([np.array(each, np.int32) for each in ids])
