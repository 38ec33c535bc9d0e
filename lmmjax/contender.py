"""What one model makes of all that is asked, step by step through the journal: answers, and likelihoods of text."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from lmmjax import answers, engine, perplexity
from lmmjax.answer import Model
from lmmjax.answers import Prompt
from lmmjax.cache import cache_bytes
from lmmjax.checkpoint import Checkpoint
from lmmjax.journal import Journal
from lmmjax.perplexity import Window
from lmmjax.plan import Plan, uniform
from lmmjax.prompt import Processor
from lmmjax.runtime import Stopwatch

WINDOWS = 4
"""Windows of text scored at once."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What every contender is given: prompts to be answered, and windows of text to be scored."""

    prompts: Sequence[Prompt]
    max_tokens: int
    batch: int
    windows: Sequence[Window]
    context: int


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model under its name: the weights as stored, the plan it runs under, and how to make it from both."""

    name: str
    stored: Checkpoint
    plan: Plan | None
    make: Callable[[], Model]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A contender's answers in the order of the prompts, its sums over the windows, and what it took."""

    texts: list[str]
    likelihood: perplexity.Result | None
    size: dict[str, Any]
    speed: dict[str, float | None]


def run(contender: Contender, processor: Processor, asked: Asked, journal: Journal) -> Outcome:
    """Returns the outcome. Steps that the journal holds are not computed again; if it holds all, no model is made."""
    parts = answers.groups(contender.plan, asked.prompts, asked.batch) if asked.prompts else []
    numbers = range(sum(len(group.batches) for group in parts))
    scored = range(-(-len(asked.windows) // WINDOWS))
    names = f"{contender.name}: answers", f"{contender.name}: text"
    open_steps = [step for name, of in zip(names, (numbers, scored), strict=True) for step in ((name, n) for n in of)]
    if not all(step in journal for step in open_steps):
        model = contender.make()
        if asked.prompts:
            _answer(names[0], model, processor, asked, parts, journal)
        if asked.windows:
            _score(names[1], model, asked, journal)
    batches = [journal[names[0], number] for number in numbers]
    results = [journal[names[1], number] for number in scored]
    return Outcome(_texts(batches), _likelihood(results), _size(contender, asked), _speed(batches, results))


def _answer(name: str, model: Model, processor: Processor, asked: Asked, parts: Sequence, journal: Journal) -> None:
    sizes = [len(batch.prompts) for group in parts for batch in group.batches]
    done = sum(size for number, size in enumerate(sizes) if (name, number) in journal)
    computed = answers.answers(
        model, processor, asked.prompts, parts, asked.max_tokens, lambda number: (name, number) in journal
    )
    with tqdm(total=sum(sizes), initial=done, desc=name, unit="answer", file=sys.stderr) as bar:
        for number, answered in computed:
            journal.add((name, number), dataclasses.asdict(answered))
            bar.update(sizes[number])


def _score(name: str, model: Model, asked: Asked, journal: Journal) -> None:
    done = next(number for number in itertools.count() if (name, number) not in journal)
    left = asked.windows[done * WINDOWS :]
    computed = perplexity.score(*model, left, context=asked.context, batch=WINDOWS)
    with tqdm(total=len(asked.windows), initial=done * WINDOWS, desc=name, unit="window", file=sys.stderr) as bar:
        for number in range(done, done + -(-len(left) // WINDOWS)):
            clock = Stopwatch()
            result = clock("prefill", next, computed)
            windows = asked.windows[number * WINDOWS :][:WINDOWS]
            sums = {"nll": result.nll.tolist(), "tokens": result.tokens.tolist()}
            read = sum(len(window.tokens) for window in windows)
            journal.add((name, number), {**sums, "read": read, "ms": dict(clock.ms)})
            bar.update(len(windows))


def _texts(batches: Sequence[dict[str, Any]]) -> list[str]:
    by_index = {int(index): text for batch in batches for index, text in batch["texts"].items()}
    return [by_index[index] for index in range(len(by_index))]


def _likelihood(results: Sequence[dict[str, Any]]) -> perplexity.Result | None:
    if not results:
        return None
    return perplexity.gather([perplexity.Result(result["nll"], result["tokens"]) for result in results])


def _size(contender: Contender, asked: Asked) -> dict[str, Any]:
    """Returns bytes: of the weights in memory, and of one sequence's cache in the plan's formats.

    A dense cache is counted in the plan's dtype, bfloat16 without one, whatever this machine computes in.
    """
    config, plan = contender.stored.config, contender.plan
    answering = answers.room(config, plan, asked.prompts, asked.max_tokens) if asked.prompts else engine.Room(0)
    room = answering._replace(capacity=max(asked.context if asked.windows else 0, answering.capacity))
    formats = plan or uniform(config.text)
    return {
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(contender.stored.params)),
        "weights_kept": 1 - formats.sparsity(config.text),
        "kv_tokens": room.capacity,
        "kv_bytes": cache_bytes(config.text, formats, 1, *room),
        "kv_dense_bytes": cache_bytes(config.text, uniform(config.text, cache=formats.cache), 1, room.capacity),
    }


def _speed(batches: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Returns tokens a second of what is read, and of what is written after each answer's first token."""

    def rate(tokens: int, phase: str) -> float | None:
        ms = sum(step["ms"].get(phase, 0) for step in (*batches, *results))
        return 1e3 * tokens / ms if tokens and ms else None

    answered = sum(len(batch["texts"]) for batch in batches)
    return {
        "read_tokens_per_second": rate(sum(step["read"] for step in (*batches, *results)), "prefill"),
        "written_tokens_per_second": rate(sum(batch["written"] for batch in batches) - answered, "decode"),
        "seconds": sum(sum(step["ms"].values()) for step in (*batches, *results)) / 1e3,
    }
