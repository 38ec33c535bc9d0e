"""Perplexity of text files: windows that slide over each file, every token scored once, through the model's cache.

A file's windows begin every `stride` tokens and hold up to `context`; the last is the first to reach the file's end.
The first scores all its tokens but the very first, the others those that no window before them held, each with at
least context - stride tokens to predict it from. (With stride = context a window's first token has nothing before
it and is not scored.) No window spans two files. Source: Hugging Face, "Perplexity of fixed-length models".
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmmjax import engine, llava
from lmmjax.cache import Cache
from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError
from lmmjax.llava import Params
from lmmjax.plan import Plan
from lmmjax.prompt import Processor, pad

CHUNK = 64
"""Positions whose logits exist at once: all of a window's would be 200 MB for 49k words."""


class Window(NamedTuple):
    """Consecutive tokens of a file, of which those from `first` on are scored."""

    file: int
    tokens: Sequence[int]
    first: int


@dataclasses.dataclass(frozen=True)
class Result:
    """Sums window by window: negative log-likelihood in nats, and the tokens scored."""

    nll: Float[np.ndarray, "w"]
    tokens: Int[np.ndarray, "w"]

    @property
    def ppl(self) -> float:
        """e to the mean negative log-likelihood of all tokens scored; infinite where that overflows."""
        mean = float(np.sum(self.nll) / np.sum(self.tokens))
        return math.exp(mean) if mean < math.log(np.finfo(float).max) else math.inf


def read(processor: Processor, files: Sequence[Path]) -> list[list[int]]:
    """Returns each file's token ids, as the checkpoint's tokenizer begins a text.

    Raises:
        InputError: a file cannot be read, is no UTF-8 text, has fewer than two tokens or holds the image token.
    """
    documents = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--text: cannot read {file} ({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from None
        ids = processor.tokenizer.encode(text, verbose=False)
        if len(ids) < 2:
            raise InputError(f"--text: {file} has {len(ids)} token(s), expected at least 2")
        if processor.config.image_token in ids:
            raise InputError(f"--text: {file} holds {processor.image_token}, which stands for an image; leave it out")
        documents.append(ids)
    return documents


def windows(documents: Sequence[Sequence[int]], context: int, stride: int) -> list[Window]:
    """Returns the windows of all documents, in order.

    Raises:
        InputError: no document, a context below 2, or a stride that is not within it.
    """
    if not documents:
        raise InputError("--text: got no file, expected at least one")
    if context < 2 or not 1 <= stride <= context:
        raise InputError(
            f"--stride: got {stride} with --context {context}; expected 1 <= stride <= context, context >= 2"
        )
    return [window for file, ids in enumerate(documents) for window in _windows(file, ids, context, stride)]


def score(
    config: LlavaConfig, params: Params, plan: Plan | None, parts: Sequence[Window], *, context: int, batch: int = 4
) -> Iterator[Result]:
    """Yields the sums of `batch` windows at a time; all batches are of one shape, so one program serves them.

    Each window is one prefill through an empty cache in the plan's formats, whose own queries see what is rounded
    if the plan says so. None keeps a dense cache. `context` is the longest window's.

    Raises:
        InputError: windows longer than the model's context.
    """
    if context > config.text.context:
        raise InputError(f"--context: got {context}, expected at most the model's {config.text.context}")
    width = padded(context)
    yield from score_in(config, params, engine.new_cache(config, params, plan, batch, width), parts, width)


def padded(context: int) -> int:
    """Returns the tokens that windows of up to `context` are padded to: whole chunks, if more than one."""
    return -(-context // CHUNK) * CHUNK if context > CHUNK else context


def score_in(
    config: LlavaConfig, params: Params, cache: Cache, parts: Sequence[Window], width: int
) -> Iterator[Result]:
    """Yields what `score` does through any empty cache, whose rows are the batch; `width` is from `padded`."""
    batch, nothing = cache.lengths.shape[0], Window(0, [0], 1)
    for start in range(0, len(parts), batch):
        real = parts[start : start + batch]
        rows = [*real, *[nothing] * (batch - len(real))]
        tokens, lengths = pad([row.tokens for row in rows], width)
        firsts = np.array([row.first for row in rows], np.int32)
        losses = np.asarray(_losses(config, params, cache, tokens, lengths, firsts), np.float64)
        yield Result(losses.sum(1)[: len(real)], (lengths - firsts)[: len(real)])


def gather(results: Sequence[Result]) -> Result:
    """Returns the sums of all windows as one result."""
    nll, tokens = zip(*((result.nll, result.tokens) for result in results), strict=True)
    return Result(np.concatenate(nll), np.concatenate(tokens))


def _windows(file: int, ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    end = 0
    for begin in range(0, len(ids), stride):
        # A token at the window's very beginning has nothing to be predicted from.
        first, end = max(end - begin, 1), min(begin + context, len(ids))
        if end - begin > first:
            yield Window(file, ids[begin:end], first)
        if end == len(ids):
            break


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    config: LlavaConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    firsts: Int[Array, "b"],
) -> Float[Array, "b t"]:
    """Returns in place t the negative log-likelihood of token t + 1 where that is scored, else 0."""
    states, _ = llava.extend(config, params, cache, llava.embed(config, params, tokens), lengths)
    target_at = jnp.arange(tokens.shape[1]) + 1
    scored = (target_at >= firsts[:, None]) & (target_at < lengths[:, None])

    def loss(chunk: tuple[Array, Array, Array]) -> Float[Array, "b c"]:
        states, targets, scored = chunk
        logits = llava.logits(config, params, states)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - own, 0)

    def loss_if_scored(chunk: tuple[Array, Array, Array]) -> Float[Array, "b c"]:
        nothing = jnp.zeros(chunk[2].shape, jnp.float32)
        return jax.lax.cond(chunk[2].any(), loss, lambda _: nothing, chunk)

    chunks = jax.tree.map(_split, (states, jnp.roll(tokens, -1, axis=1), scored))
    return jnp.moveaxis(jax.lax.map(loss_if_scored, chunks), 0, 1).reshape(tokens.shape)


def _split(x: Array) -> Array:
    """Returns (b, t, ...) as chunks of positions (t / c, b, c, ...)."""
    size = min(CHUNK, x.shape[1])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
