"""Tokens from a prompt: two compiled programs, prefill and decode. Knows nothing of text.

Both take a batch of unequal prompts, padded on the right; a row's tokens are those it would get alone. What
changes from call to call (prompts, lengths, sampling, how far to decode) is data: only shapes compile.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from kernels import attend
from lmmjax import llava
from lmmjax.attention import CachedAttention
from lmmjax.cache import Cache, empty_cache
from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError
from lmmjax.llava import Params
from lmmjax.plan import Plan, uniform
from lmmjax.prompt import bucket
from lmmjax.sample import GREEDY, Sampling, sample

_OF_PROMPTS = {"xla_gpu_dot_merger_threshold_mb": 0}
"""Else a GPU lays the weights of k and v side by side at every prompt, to multiply by both at once: on an H100 a
thirteenth of a 7B decoder's time."""


class State(struct.PyTreeNode):
    """A batch of answers in the making.

    Row b has written answer[b, :counts[b]]; its prompt and all of these but the last are in the cache. It may
    write limits[b] tokens, and is done when it has, or has written one of `eos`.
    """

    cache: Cache
    answer: Int[Array, "b s"]
    counts: Int[Array, "b"]
    limits: Int[Array, "b"]
    done: Bool[Array, "b"]
    keys: Key[Array, "b"]
    sampling: Sampling
    eos: Int[Array, "ends"]


encode_images = jax.jit(llava.encode_images, static_argnums=0)
"""The vision program: (config, params, pixels (n, c, y, x)) -> embeddings (n, p, e)."""


@functools.partial(
    jax.jit, static_argnames=("config", "backend"), donate_argnames="state", compiler_options=_OF_PROMPTS
)
def prefill(
    config: LlavaConfig,
    params: Params,
    state: State,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    images: Float[Array, "n p e"] | None,
    backend: str | None = None,
) -> State:
    """Returns the state with the prompts in its cache and the first token of every answer. Consumes `state`."""
    states, cache = _append(config, params, state.cache, tokens, lengths, images, backend)
    last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return _write(state.replace(cache=cache), llava.logits(config, params, last))


@functools.partial(jax.jit, static_argnames=("config", "backend"), donate_argnames="state")
def decode(
    config: LlavaConfig, params: Params, state: State, steps: Int[Array, ""] | int, backend: str | None = None
) -> State:
    """Returns the state after `steps` more tokens a row, or when all rows are done. Consumes `state`."""

    def goes_on(carry: tuple[Array, State]) -> Bool[Array, ""]:
        step, state = carry
        return (step < steps) & ~state.done.all()

    def advance(carry: tuple[Array, State]) -> tuple[Array, State]:
        step, state = carry
        last = jnp.take_along_axis(state.answer, state.counts[:, None] - 1, axis=1)
        x = llava.embed(config, params, last)
        states, cache = llava.extend(config, params, state.cache, x, jnp.where(state.done, 0, 1), backend)
        return step + 1, _write(state.replace(cache=cache), llava.logits(config, params, states[:, 0]))

    return jax.lax.while_loop(goes_on, advance, (jnp.zeros((), jnp.int32), state))[1]


def start(
    config: LlavaConfig,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    lengths: Int[ArrayLike, "b"],
    images: Float[Array, "n p e"] | None = None,
    *,
    max_tokens: int,
    plan: Plan | None = None,
    sampling: Sampling = GREEDY,
    keys: Key[Array, "b"] | None = None,
    eos: Sequence[int] = (),
    backend: str | None = None,
    past: Cache | None = None,
) -> State:
    """Returns the state after the prompts, with the first token of every answer.

    Args:
        tokens, lengths: prompts padded on the right (see `prompt.pad`), and how many tokens of each row count.
        images: all of the batch's images in order of appearance, from `encode_images`.
        max_tokens: at most so many a row; the context's end also ends an answer.
        plan: its cache formats; None keeps a dense cache in the weights' dtype. Without effect on a `past`.
        sampling, keys: how tokens are drawn, and a key a row where the temperature is not 0.
        eos: tokens that end an answer.
        backend: of attention, see `kernels.attend`.
        past: the prompts' beginnings, from `read`; `tokens` are then the rest of each. Consumed.

    Raises:
        InputError: a prompt does not fit the context, or its image tokens are not as many as the images give.
    """
    tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    before = np.zeros_like(lengths) if past is None else np.asarray(past.lengths)
    _check_prompts(config, tokens, lengths, images, before)
    batch, t = tokens.shape
    visual = _images(config, tokens, lengths)
    if past is None:
        cache = new_cache(config, params, plan, batch, *room(config, plan, t, visual, max_tokens))
    else:
        past.check_room(lengths, visual)
        cache = past
    left = np.minimum(config.text.context - before - lengths, cache.room_left(visual) - (lengths - visual))
    limits = np.minimum(max_tokens, left + 1)
    state = State(
        cache=cache,
        answer=jnp.zeros((batch, cache.capacity), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        limits=jnp.asarray(limits, jnp.int32),
        done=jnp.asarray(limits < 1),
        # Copies, for the programs consume the state, and the caller may use these again.
        keys=jax.random.split(jax.random.key(0), batch) if keys is None else jnp.copy(keys),
        sampling=sampling.typed(),
        eos=jnp.array(eos, jnp.int32),
    )
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return prefill(config, params, state, tokens, lengths, images, backend)


@functools.partial(
    jax.jit, static_argnames=("config", "backend"), donate_argnames="cache", compiler_options=_OF_PROMPTS
)
def read(
    config: LlavaConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    images: Float[Array, "n p e"] | None,
    backend: str | None = None,
) -> Cache:
    """Returns the cache with beginnings of prompts appended, which `start` takes as `past`. Consumes `cache`."""
    return _append(config, params, cache, tokens, lengths, images, backend)[1]


rows = jax.jit(Cache.rows)
"""`Cache.rows` as a program."""


def generate(
    config: LlavaConfig,
    params: Params,
    tokens: Int[ArrayLike, "b t"],
    lengths: Int[ArrayLike, "b"],
    images: Float[Array, "n p e"] | None = None,
    *,
    backend: str | None = None,
    **settings: Any,
) -> list[list[int]]:
    """Returns the whole answer of every row, its ending token included. Arguments are those of `start`.

    `backend` is that of the attention of decode steps; the prompts take the first that can.
    """
    state = start(config, params, tokens, lengths, images, **settings)
    return answers(decode(config, params, state, state.answer.shape[1], backend))


def answers(state: State) -> list[list[int]]:
    """Returns what every row has written so far."""
    rows, counts = np.asarray(state.answer), np.asarray(state.counts)
    return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]


class Room(NamedTuple):
    """Tokens that a row of a cache has room for, and how many of these at most are image tokens kept apart."""

    capacity: int
    images: int = 0


def room(
    config: LlavaConfig, plan: Plan | None, t: int, images: Int[np.ndarray, "b"] | Sequence[int], max_tokens: int
) -> Room:
    """Returns the room for prompts of up to t tokens, images[b] of them image tokens, and for their answers."""
    if plan is None or not plan.splits_images:
        return Room(cache_capacity(config, t, max_tokens))
    most, text = int(np.max(images)), t - int(np.min(images))
    return Room(min(bucket(text + max_tokens), max(text, config.text.context - int(np.min(images)))) + most, most)


def cache_capacity(config: LlavaConfig, t: int, max_tokens: int) -> int:
    """Returns the tokens that the cache has room for: few different numbers, so that programs are shared."""
    return min(bucket(t + max_tokens), max(t, config.text.context))


def new_cache(
    config: LlavaConfig, params: Params, plan: Plan | None, batch: int, capacity: int, images: int = 0
) -> Cache:
    """Returns an empty cache in the plan's formats; without a plan dense, in the weights' dtype.

    `images` of the capacity's tokens are image tokens at most; see `empty_cache`.
    """
    dtype = None if plan else _dtype(params)
    return empty_cache(config.text, plan or uniform(config.text), batch, capacity, dtype, images)


def backends(config: LlavaConfig, params: Params, cache: Cache, t: int, name: str | None = None) -> tuple[str, ...]:
    """Returns which attention backends run, over all layers, when t tokens a row are appended to this cache.

    Found by tracing the very call that the decoder makes, without computing anything.
    """
    batch, text, dtype = cache.lengths.shape[0], config.text, _dtype(params)
    q = jax.ShapeDtypeStruct((batch, text.heads, t, text.head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, text.kv_heads, t, text.head_dim), dtype)

    def run(cache: Cache, q: Array, k: Array, v: Array) -> None:
        rotation = llava.turn(config, jnp.arange(t)[None])
        positions = llava.turn(config, jnp.arange(cache.capacity)[None])
        for keys, values in cache.layers:
            rows = cache.lengths, cache.lengths, cache.visual
            CachedAttention(keys, values, *rows, positions, cache.form, name)(q, k, v, rotation)

    with attend.recorded() as names:
        jax.eval_shape(run, cache, q, k, k)
    return tuple(dict.fromkeys(names))


def _append(
    config: LlavaConfig, params: Params, cache: Cache, tokens: Array, lengths: Array, images: Any, backend: str | None
) -> tuple[Float[Array, "b t e"], Cache]:
    """Returns the final states of prompts, and the cache with them appended."""
    x = llava.embed(config, params, tokens, images, lengths)
    visual = llava.image_tokens(config, tokens, lengths)
    return llava.extend(config, params, cache, x, lengths, backend, visual)


def _dtype(params: Params) -> str:
    return str(params["text"]["embedding"].dtype)


def _write(state: State, logits: Float[Array, "b v"]) -> State:
    """Returns the state with one more token in every row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.counts)
    token = sample(logits, keys, state.sampling)
    at = jnp.where(state.done, state.answer.shape[1], state.counts)
    counts = state.counts + jnp.where(state.done, 0, 1)
    return state.replace(
        answer=state.answer.at[jnp.arange(at.size), at].set(token, mode="drop"),
        counts=counts,
        done=state.done | jnp.isin(token, state.eos) | (counts >= state.limits),
    )


def _images(config: LlavaConfig, tokens: np.ndarray, lengths: np.ndarray) -> Int[np.ndarray, "b"]:
    """Returns how many image tokens each prompt has."""
    return (config.is_image(tokens) & (np.arange(tokens.shape[1]) < lengths[:, None])).sum(1)


def _check_prompts(
    config: LlavaConfig, tokens: np.ndarray, lengths: np.ndarray, images: Array | None, before: np.ndarray
) -> None:
    if lengths.min() < 1 or lengths.max() > tokens.shape[1] or (before + lengths).max() > config.text.context:
        raise InputError(
            f"prompts: got {lengths.min()} to {(before + lengths).max()} tokens; expected 1 to the context of"
            f" {config.text.context}, in an array {tokens.shape[1]} wide"
        )
    found = int(_images(config, tokens, lengths).sum())
    given = 0 if images is None else images.shape[0] * images.shape[1]
    if found != given:
        raise InputError(f"prompts: {found} image tokens, but the images make {given}")
