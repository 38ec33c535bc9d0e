"""Augmentation that invents nothing: the same shape elsewhere on its own background."""

import numpy as np
from jaxtyping import Bool, Float, Int


class Mover:
    """Moves an image's shape to a random place, and mirrors it, without cutting it.

    easy-VQA's backgrounds are of one colour, so rolling an image by less than the background's margins moves
    the shape alone. Only left and right are mirrored: its triangles all stand upright.
    """

    def __init__(self, pixels: Float[np.ndarray, "i c y x"]):
        inside = (pixels != _commonest(pixels)).any(1)
        self.rows, self.columns = _margins(inside.any(2)), _margins(inside.any(1))

    def __call__(
        self, rng: np.random.Generator, pixels: Float[np.ndarray, "r c y x"], images: Int[np.ndarray, "r"]
    ) -> Float[np.ndarray, "r c y x"]:
        """Returns the pixels of these images, each moved and mirrored by its own draw."""
        moved = np.empty_like(pixels)
        for index, image in enumerate(images):
            up, down = self.rows[image]
            left, right = self.columns[image]
            shift = (rng.integers(-up, down + 1), rng.integers(-left, right + 1))
            moved[index] = np.roll(pixels[index], shift, axis=(1, 2))
        mirrored = rng.random(len(moved)) < 0.5
        moved[mirrored] = moved[mirrored, :, :, ::-1]
        return moved


def _commonest(pixels: Float[np.ndarray, "i c y x"]) -> Float[np.ndarray, "i c 1 1"]:
    """Returns each image's most frequent colour, its background."""
    colours = []
    for image in pixels.reshape(*pixels.shape[:2], -1):
        found, counts = np.unique(image, axis=1, return_counts=True)
        colours.append(found[:, counts.argmax()])
    return np.stack(colours)[:, :, None, None]


def _margins(inside: Bool[np.ndarray, "i n"]) -> Int[np.ndarray, "i 2"]:
    """Returns how many entries lie before the first and behind the last true one."""
    return np.stack([inside.argmax(1), inside[:, ::-1].argmax(1)], axis=1)
