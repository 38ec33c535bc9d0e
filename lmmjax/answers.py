"""Many questions answered greedily in batches: an image is read once for all questions on it.

Prompts about one image begin alike, up to its last token. That beginning is computed once, by the vision tower and
by the decoder, and each question goes on from a copy of its cache: an answer costs its question's few tokens. It is
the answer that the question gets alone, for a cache is a function of its tokens, however they were appended.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmjax import engine
from lmmjax.answer import Model
from lmmjax.cache import Cache
from lmmjax.config import LlavaConfig
from lmmjax.plan import Plan
from lmmjax.prompt import Processor, bucket, pad
from lmmjax.runtime import Stopwatch

IMAGES = 8
"""Beginnings read at once; their caches are held together, 2.4 GB in bfloat16 for those of LLaVA 1.5 7B."""


class Prompt(NamedTuple):
    """A question as token ids, the first `shared` of which are alike for all questions on its image."""

    ids: Sequence[int]
    image: Path | None
    shared: int


class Beginning(NamedTuple):
    """What several prompts have in common; nothing but the image where beginnings are not shared."""

    ids: tuple[int, ...]
    image: Path | None


class Batch(NamedTuple):
    """Prompts by their index, and each one's beginning by its place in the group."""

    prompts: tuple[int, ...]
    beginnings: tuple[int, ...]


class Group(NamedTuple):
    """Beginnings that are read together, and the batches that go on from them."""

    beginnings: tuple[Beginning, ...]
    batches: tuple[Batch, ...]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A batch's answers: texts by prompt index, tokens written and read, and milliseconds by phase.

    What the whole group has read is counted with the first of its batches that is computed.
    """

    texts: dict[int, str]
    written: int
    read: int
    ms: dict[str, float]


def prompts(processor: Processor, asked: Sequence[tuple[str, Path | None]]) -> list[Prompt]:
    """Returns the prompts of questions and their images, in the checkpoint's chat template.

    Raises:
        InputError: a question does not fit the context, or has placeholders for another number of images.
    """
    encoded: dict[tuple[str, int], list[int]] = {}
    made = []
    for text, image in asked:
        key = text, int(image is not None)
        if key not in encoded:
            encoded[key] = processor.encode(processor.render(*key), key[1])
        ids = encoded[key]
        image_at = [i for i, token in enumerate(ids) if token == processor.config.image_token]
        made.append(Prompt(ids, image, image_at[-1] + 1 if image_at else 0))
    return made


def groups(plan: Plan | None, asked: Sequence[Prompt], size: int) -> list[Group]:
    """Returns the prompts in batches of at most `size`, of like lengths; a function of its arguments alone.

    A plan whose prompts see themselves unrounded reads every prompt whole: what was read before is seen rounded.
    """
    share = plan is None or plan.cache.quantize_prefill
    members: dict[Beginning, list[int]] = defaultdict(list)
    for index, prompt in enumerate(asked):
        members[Beginning(tuple(prompt.ids[: prompt.shared]) if share else (), prompt.image)].append(index)
    alike: dict[tuple[bool, int], list[Beginning]] = defaultdict(list)
    for beginning in members:
        alike[beginning.image is None, bucket(len(beginning.ids))].append(beginning)
    chunks = [each[at : at + IMAGES] for each in alike.values() for at in range(0, len(each), IMAGES)]
    return [_group(chunk, [members[one] for one in chunk], asked, size) for chunk in chunks]


def room(config: LlavaConfig, plan: Plan | None, asked: Sequence[Prompt], max_tokens: int) -> engine.Room:
    """Returns what every row's cache has room for."""
    images = [prompt.ids.count(config.image_token) for prompt in asked]
    return engine.room(config, plan, max(len(prompt.ids) for prompt in asked), images, max_tokens)


def answers(
    model: Model,
    processor: Processor,
    asked: Sequence[Prompt],
    parts: Sequence[Group],
    max_tokens: int,
    is_done: Callable[[int], bool],
) -> Iterator[tuple[int, Answered]]:
    """Yields the number of each batch that is not done, counted through all groups, and its answers."""
    number, every = 0, room(model.config, model.plan, asked, max_tokens)
    size = max(len(batch.prompts) for group in parts for batch in group.batches)
    width = max(len(group.beginnings) for group in parts)
    for group in parts:
        past = None
        for batch in group.batches:
            if not is_done(number):
                clock, read = Stopwatch(), 0
                if past is None:
                    past = _read(model, processor, group, width, every, clock)
                    read = sum(len(one.ids) for one in group.beginnings)
                rows = [asked[index].ids[len(group.beginnings[at].ids) :] for index, at in zip(*batch, strict=True)]
                ids = _answer(model, processor, rows, batch.beginnings, past, size, max_tokens, clock)
                texts = {index: processor.decode(row).strip() for index, row in zip(batch.prompts, ids, strict=True)}
                yield number, Answered(texts, sum(map(len, ids)), read + sum(map(len, rows)), dict(clock.ms))
            number += 1


def _group(chunk: Sequence[Beginning], members: Sequence[list[int]], asked: Sequence[Prompt], size: int) -> Group:
    """Returns the group of these beginnings, whose prompts are `members`; the shortest questions come first."""
    places = [(index, at) for at, indices in enumerate(members) for index in indices]
    places.sort(key=lambda place: (bucket(len(asked[place[0]].ids) - len(chunk[place[1]].ids)), place[0]))
    batches = [places[at : at + size] for at in range(0, len(places), size)]
    return Group(tuple(chunk), tuple(Batch(*zip(*batch, strict=True)) for batch in batches))


Past = tuple[Float[Array, "n p e"] | None, Cache | None]
"""What a group's beginnings came to: their images' embeddings, and a cache with a row each if they are shared."""


def _read(model: Model, processor: Processor, group: Group, width: int, room: engine.Room, clock: Stopwatch) -> Past:
    """Returns what the beginnings come to, always as many rows, so that few programs are compiled."""
    config, params, plan = model
    beginnings = [*group.beginnings, *[group.beginnings[0]] * (width - len(group.beginnings))]
    pictures = [one.image for one in beginnings if one.image is not None]
    if not pictures:
        return None, None
    images = clock("vision", engine.encode_images, config, params, processor.pixels(pictures))
    if not beginnings[0].ids:
        return images, None
    cache = engine.new_cache(config, params, plan, width, *room)
    tokens, lengths = pad([one.ids for one in beginnings])
    return images, clock("prefill", engine.read, config, params, cache, tokens, lengths, images)


def _answer(
    model: Model,
    processor: Processor,
    rows: Sequence[Sequence[int]],
    beginnings: Sequence[int],
    past: Past,
    size: int,
    max_tokens: int,
    clock: Stopwatch,
) -> list[list[int]]:
    """Returns the answers' ids; the batch is filled up to `size` with copies of its first row."""
    config, params, plan = model
    more = size - len(rows)
    images, cache = past
    at = jnp.array([*beginnings, *[beginnings[0]] * more])
    settings = {"max_tokens": max_tokens, "plan": plan, "eos": processor.eos}
    if cache is not None:
        settings |= {"past": clock("prefill", engine.rows, cache, at)}
    shown = images[at] if images is not None and cache is None else None
    padded = pad([*rows, *[rows[0]] * more])
    state = clock("prefill", engine.start, config, params, *padded, shown, **settings)
    state = clock("decode", engine.decode, config, params, state, max_tokens)
    return engine.answers(state)[: len(rows)]
