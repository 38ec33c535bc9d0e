"""What a calibration runs on: questions about images, windows of text, or both."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmmjax import data, perplexity
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.prompt import Processor


@dataclasses.dataclass(frozen=True)
class Recipe:
    """So many questions of `data` (None: none) and so many windows of `length` tokens of the text files, by a seed."""

    data: str | None
    samples: int
    text: tuple[Path, ...] = ()
    windows: int = 0
    length: int = 2048
    seed: int = 0


def encode(processor: Processor, recipe: Recipe) -> list[Encoded]:
    """Returns the samples as arrays, those of images and those of text apart.

    Raises:
        InputError: there is nothing to calibrate on, a file cannot be used, or the model does not see.
    """
    found = []
    if recipe.data is not None:
        if not processor.config.sees:
            raise InputError(
                f"--data: {processor.directory} has no vision tower and reads text alone, but the questions show"
                " images; give --text FILE"
            )
        (chosen,) = data.disjoint(data.load(recipe.data, "train"), [recipe.samples], recipe.seed)
        found.append(data.encode(processor, chosen))
    if recipe.text:
        documents = perplexity.read(processor, recipe.text)
        found.append(windows(documents, recipe.windows, recipe.length, recipe.seed))
    if not found:
        raise InputError("--data, --text: got neither; expected questions about images, files of text, or both")
    return found


def windows(documents: Sequence[Sequence[int]], count: int, length: int, seed: int) -> Encoded:
    """Returns random windows of the documents, each place as likely as any other; none spans two documents.

    Raises:
        InputError: no document is that long.
    """
    places = np.array([max(0, len(ids) - length + 1) for ids in documents])
    if not places.sum():
        raise InputError(
            f"--text: windows have {length} tokens, and the longest file has {max(map(len, documents))};"
            " give longer files, or a smaller --length"
        )
    if short := int((places == 0).sum()):
        left_out = f"--text: {short} of {len(documents)} files are shorter than {length} tokens and left out"
        print(left_out, file=sys.stderr)
    drawn = np.random.default_rng(seed).integers(places.sum(), size=count)
    ends = np.cumsum(places)
    chosen = np.searchsorted(ends, drawn, side="right")
    starts = drawn - (ends - places)[chosen]
    tokens = np.array([documents[i][start : start + length] for i, start in zip(chosen, starts, strict=True)], np.int32)
    return Encoded(tokens, np.full(count, length, np.int32), np.zeros(tokens.shape, bool), None, ("text",) * count)


def digest(samples: Sequence[Encoded]) -> str:
    """Returns a short hash of the samples."""
    found = hashlib.sha256()
    for encoded in samples:
        for part in (encoded.tokens, encoded.lengths, encoded.pixels):
            found.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]
