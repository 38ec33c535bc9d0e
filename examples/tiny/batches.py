"""Which images and questions a step learns from: a function of (seed, step), so that a resumed run is the same run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from examples.tiny.learning import COLOURS, SHAPES
from examples.tiny.moving import Mover
from examples.vqa.packing import Pack
from lmmjax.data import Sample


@dataclasses.dataclass(frozen=True)
class Batches:
    """First whole images with their labels, then images with questions: surprising ones, at the end all alike."""

    data: Pack
    labels: Int[np.ndarray, "i 2"]
    mover: Mover
    seed: int
    look_steps: int
    steps: int
    rows: int
    questions: int

    def stage(self, step: int) -> str:
        """Returns "look" or "answer"."""
        return "look" if step < self.look_steps else "answer"

    def __call__(self, step: int) -> tuple[np.ndarray, ...]:
        """Returns (pixels, labels) while looking, (pixels, tokens, is_answer) while answering."""
        rng = np.random.default_rng((self.seed, step))
        looking = self.stage(step) == "look"
        images = rng.choice(len(self.data.shown), self.rows * (2 if looking else 1), replace=False)
        if looking:
            return self.mover(rng, self.data.shown[images], images), self.labels[images]
        power = 1.0 if step - self.look_steps < 0.6 * self.steps else 0.0
        chosen = self.data.draw(rng, images, self.questions, self.data.surprise**power)
        return self.mover(rng, self.data.shown[images], images), *self.data.tokens(chosen)


def image_labels(samples: Sequence[Sample]) -> Int[np.ndarray, "i 2"]:
    """Returns each image's shape and colour as far as the answers about it tell, else -1."""
    labels: dict[Path, list[int]] = {}
    for sample in samples:
        row = labels.setdefault(sample.image, [-1, -1])
        for column, names in enumerate((SHAPES, COLOURS)):
            if sample.answer in names:
                row[column] = names.index(sample.answer)
    return np.array(list(labels.values()))
