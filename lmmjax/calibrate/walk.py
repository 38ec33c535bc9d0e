"""The walk over the decoder: all samples' hidden states move on layer by layer, and each layer is looked at on the way.

In memory are the hidden states, (samples, t, e) in the parameters' dtype, and one layer with its statistics.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from lmmjax import data, llava
from lmmjax.calibrate.layer import collect, forward
from lmmjax.calibrate.statistics import LayerStatistics
from lmmjax.calibrate.tokens import CHOICES, Rows
from lmmjax.config import LlavaConfig, TextConfig
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.linears import SHARED
from lmmjax.llava import Params

TOKENS = 2048
"""Positions computed at once, if a sequence is no longer: attention's scores take their square."""


def embedded(config: LlavaConfig, outer: Params, samples: Encoded | Sequence[Encoded]) -> list[Rows]:
    """Returns the samples' embeddings in batches of one length each; `outer` as in `layered.Layered`."""
    sets = [samples] if isinstance(samples, Encoded) else samples
    return [rows for encoded in sets for rows in _batches(config, outer, encoded)]


def check_choice(choice: str) -> None:
    """Raises InputError for an unknown choice of tokens."""
    if choice not in CHOICES:
        raise InputError(f"calibration tokens: got {choice!r}, expected {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")


def look(
    text: TextConfig, layer: Params, rows: list[Rows], choice: str, grams: bool, move: bool, where: str
) -> LayerStatistics:
    """Returns a layer's statistics; if asked to, moves the rows through it at the same time.

    Raises:
        InputError: no samples, or numbers that are not finite; `where` names the layer.
    """
    total = None
    for index, batch in enumerate(rows):
        sums, out = collect(text, layer, batch, choice, grams)
        total = sums if total is None else total + sums
        if move:
            rows[index] = batch.replace(x=out)
    if total is None:
        raise InputError("calibration: got no samples, expected at least one")
    stats = total.statistics
    if not all(bool(jnp.isfinite(stats[name].x_sq).all()) for name in SHARED):
        raise InputError(
            f"{where}: what its linears are fed is not finite; weights before them hold inf or NaN, or overflow"
            f" {rows[0].x.dtype}: convert the model with --dtype bfloat16 or float32"
        )
    return stats


def move(text: TextConfig, layer: Params, rows: list[Rows]) -> None:
    """Replaces the rows' hidden states by what the layer makes of them."""
    for index, batch in enumerate(rows):
        rows[index] = batch.replace(x=forward(text, layer, batch))


def _batches(config: LlavaConfig, outer: Params, encoded: Encoded) -> Iterator[Rows]:
    """Yields batches of one size, the last filled up with rows of padding."""
    samples, length = encoded.tokens.shape
    size = max(1, min(samples, TOKENS // length))
    for rows, real in data.batches(samples, size):
        tokens, lengths = encoded.tokens[rows], encoded.lengths[rows]
        valid = (np.arange(length) < lengths[:, None]) & real[:, None]
        x = llava.embed_prompts(config, outer, tokens, lengths, encoded.pixels_of(rows))
        visual = valid & config.is_image(tokens)
        yield Rows(x, jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(visual))
