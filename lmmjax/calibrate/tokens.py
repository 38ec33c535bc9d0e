"""Which tokens count in a calibration: all, those of text, or text and the visual tokens that a layer moves most."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

CHOICES = ("all", "text", "drift")


class Rows(struct.PyTreeNode):
    """A batch of sequences on their way through the decoder: hidden states, and which of them are real and visual."""

    x: Float[Array, "b t e"]
    tokens: Int[Array, "b t"]
    valid: Bool[Array, "b t"]
    visual: Bool[Array, "b t"]


def choose(choice: str, rows: Rows, out: Float[Array, "b t e"]) -> Bool[Array, "b t"]:
    """Returns the positions that count in a layer that turns the rows into `out`.

    "drift" takes all text and, of each sequence, the K visual tokens with the largest 1 - cos(x_in, x_out), where K is
    the mean of that over its visual tokens times its number of text tokens. Source: ATV-Pruning.
    """
    text = rows.valid & ~rows.visual
    if choice != "drift":
        return rows.valid if choice == "all" else text
    drifts = jnp.where(rows.visual, 1 - cosine(rows.x, out), -jnp.inf)
    mean = jnp.where(rows.visual, drifts, 0).sum(1) / jnp.maximum(rows.visual.sum(1), 1)
    count = jnp.floor(mean * text.sum(1))
    place = jnp.argsort(jnp.argsort(-drifts, axis=1, stable=True), axis=1)
    return text | (rows.visual & (place < count[:, None]))


def cosine(a: Float[Array, "*b e"], b: Float[Array, "*b e"]) -> Float[Array, "*b"]:
    """Returns the cosine of vectors, in float32; 0 where one of them is 0."""
    return jnp.sum(unit(a) * unit(b), axis=-1)


def unit(a: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Returns the vectors at length 1, in float32; 0 stays 0."""
    a = a.astype(jnp.float32)
    norm = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.where(norm == 0, 1, norm)
