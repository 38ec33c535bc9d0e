"""One question answered by a loaded model: the text as it comes, and what it took in time and bytes."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kernels.attend import BACKENDS
from kernels.weights.matmul import choose
from lmmjax import checkpoint, engine, files, weights
from lmmjax.cache import cache_bytes
from lmmjax.checkpoint import Checkpoint
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import InputError
from lmmjax.joined import join_linears
from lmmjax.llava import Params
from lmmjax.plan import Plan, uniform
from lmmjax.planned import planned_cache
from lmmjax.prompt import Processor, pad
from lmmjax.runtime import Stopwatch
from lmmjax.sample import Sampling

STRIDE_SECONDS = 0.1
"""About how long the device decodes between two looks at the host: text flows, and Ctrl-C is answered."""


class Model(NamedTuple):
    """What answers: weights already compressed as `plan` says, which also gives the cache's formats."""

    config: LlavaConfig
    params: Params
    plan: Plan | None


class Request(NamedTuple):
    """One question: prompt ids as the processor expands them, the images' pixels, and how to answer."""

    ids: Sequence[int]
    pixels: Float[np.ndarray, "n c y x"]
    max_tokens: int
    sampling: Sampling
    seed: int = 0
    backend: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was said and what it took. Milliseconds without compiling, which `compile_ms` holds; bytes as allocated.

    `stopped` is "end" (the model's own), "length" (max_tokens or the context) or "interrupt". The first token
    belongs to prefill. `kv_dense_bytes` is what the same capacity takes with nothing quantized. `products` counts the
    packed matrices by their backend in a decode step and their format; plain arrays are XLA's and not among them.
    """

    text: str
    tokens: int
    stopped: str
    prompt_tokens: int
    images: int
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    compile_ms: float
    weights_bytes: int
    kv_bytes: int
    kv_dense_bytes: int
    kv_capacity: int
    attention: dict[str, tuple[str, ...]]
    products: dict[str, int]
    device: str

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None where a single token leaves nothing to measure."""
        return 1e3 * (self.tokens - 1) / self.decode_ms if self.tokens > 1 else None


def read_config(path: Path) -> LlavaConfig:
    """Returns the config of a checkpoint whose weights are not loaded yet."""
    return from_hf(files.read_json(path / "config.json"))


def load(path: Path, plan: Plan | None = None) -> Model:
    """Returns the checkpoint's model, compressed by `plan` if there is one, ready to run; see `compress`, `joined`.

    Raises:
        InputError: the checkpoint or the plan cannot be used, or they contradict each other.
    """
    model = compress(checkpoint.load(path), plan)
    return model._replace(params=join_linears(model.config.text, model.params))


def outline(path: Path, plan: Plan | None = None) -> Model:
    """Returns what `load` would, with shapes in the place of the weights: nothing is read, pruned or allocated.

    Raises:
        InputError: as `load`, as far as it can be known.
    """
    stored = checkpoint.outline(path)
    return Model(stored.config, stored.params, _chosen(stored, plan))


def compress(stored: Checkpoint, plan: Plan | None = None) -> Model:
    """Returns a loaded checkpoint's model, compressed by `plan` if there is one, else as the checkpoint says it is.

    A plan that prunes is replayed on dense weights; weights that are pruned already must have the same drops.

    Raises:
        InputError: the plan cannot be used on this checkpoint.
    """
    chosen = _chosen(stored, plan)
    if chosen is None or chosen == stored.plan:
        return Model(stored.config, stored.params, chosen)
    if not chosen.prunes or _drops_of(stored):
        return Model(stored.config, _turned(stored, _is_folded(chosen)), chosen)
    from lmmjax.prune.replay import replay  # pulls in data sets and calibration, which no other path needs

    recipe = chosen.calibration
    print(f"pruning as the plan records, calibrated on {recipe.samples} samples of {recipe.data}", file=sys.stderr)
    # The plan's drops are those of the weights as they came, without a rotation.
    plain = dataclasses.replace(stored, params=_turned(stored, False), plan=None)
    pruned = dataclasses.replace(plain, params=replay(plain, chosen))
    return Model(stored.config, _turned(pruned, _is_folded(chosen)), chosen)


def _chosen(stored: Checkpoint, plan: Plan | None) -> Plan | None:
    """Returns the plan that a checkpoint is used by: `plan` or else its own; raises InputError if they contradict."""
    if plan is None or plan == stored.plan:
        return stored.plan
    plan.check(stored.config.text)
    done = _drops_of(stored)
    if weights.matrices(stored.params) and (_is_folded(plan) != _is_folded(stored.plan) or (plan.prunes and not done)):
        raise InputError(f"--plan: {stored.path} is packed, and the plan changes weights; give the model it came from")
    if done and done != _drops(plan):
        raise InputError(f"--plan: {stored.path} is pruned by another plan; give the dense checkpoint it came from")
    return plan


def _is_folded(plan: Plan | None) -> bool:
    return plan is not None and plan.cache.rotate_values == "folded"


def _turned(stored: Checkpoint, folded: bool) -> Params:
    """Returns a checkpoint's params with the values' rotation folded in, or taken out."""
    if _is_folded(stored.plan) == folded:
        return stored.params
    from lmmjax.fold import fold_values

    return fold_values(stored.config.text, stored.params)


def answer(model: Model, processor: Processor, request: Request, show: Callable[[str], object]) -> Answer:
    """Returns the answer, each piece of its text given to `show` as soon as it is settled.

    Ctrl-C ends the answer with what has been shown.

    Raises:
        InputError: the request does not fit the model, or its attention backend cannot run it.
    """
    config, params, plan = model
    clock = Stopwatch()
    tokens, lengths = pad([request.ids])
    room = engine.room(config, plan, tokens.shape[1], [request.ids.count(config.image_token)], request.max_tokens)
    attention = _attention(model, tokens.shape[1], room, request.backend)
    images = clock("vision", engine.encode_images, config, params, request.pixels) if len(request.pixels) else None
    settings = {
        "max_tokens": request.max_tokens,
        "plan": plan,
        "sampling": request.sampling,
        "keys": jax.random.split(jax.random.key(request.seed), 1),
        "eos": processor.eos,
    }
    state = clock("prefill", engine.start, config, params, tokens, lengths, images, **settings)
    kv_bytes, kv_capacity = state.cache.nbytes, state.cache.capacity
    ids, text, stopped = _stream(model, processor, request, state, clock, show)
    return Answer(
        text=text,
        tokens=len(ids),
        stopped=stopped,
        prompt_tokens=len(request.ids),
        images=len(request.pixels),
        vision_ms=clock.ms["vision"],
        prefill_ms=clock.ms["prefill"],
        decode_ms=clock.ms["decode"],
        compile_ms=clock.ms["compile"],
        weights_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        kv_bytes=kv_bytes,
        kv_dense_bytes=_dense_bytes(config, plan, kv_capacity) if plan else kv_bytes,
        kv_capacity=kv_capacity,
        attention=attention,
        products=products(params),
        device=jax.devices()[0].device_kind,
    )


def check_backend(name: str | None) -> None:
    """Raises InputError for a backend that does not exist, before anything is loaded."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"--backend: got {name}, expected one of {', '.join(BACKENDS)}")


def _stream(
    model: Model, processor: Processor, request: Request, state: engine.State, clock: Stopwatch, show: Callable
) -> tuple[list[int], str, str]:
    """Returns the answer's ids, its text and why it stopped, after showing the text piece by piece."""
    ids, text, stopped = engine.answers(state)[0], "", "interrupt"
    try:
        steps = 1
        while True:
            done = bool(state.done[0])
            ids = engine.answers(state)[0]
            piece = _settled(processor.decode(ids), done)[len(text) :]
            text += piece
            show(piece)
            if done:
                stopped = "end" if ids and ids[-1] in processor.eos else "length"
                break
            before = clock.ms["decode"]
            state = clock("decode", engine.decode, model.config, model.params, state, steps, request.backend)
            steps = max(1, int(steps * 1e3 * STRIDE_SECONDS / (clock.ms["decode"] - before)))
    except KeyboardInterrupt:
        pass  # the state may be consumed already; the ids of the last look are whole
    return ids, text, stopped


def _settled(text: str, done: bool) -> str:
    """Returns the text without the space that joins it to the prompt, and no last character half written."""
    return (text if done else text.rstrip("\N{REPLACEMENT CHARACTER}")).removeprefix(" ")


def _attention(model: Model, t: int, room: engine.Room, name: str | None) -> dict[str, tuple[str, ...]]:
    """Returns which backends will run in each phase, known before anything is computed; `name` is decode's."""
    config, params, plan = model
    cache = planned_cache(config, params, plan, 1, *room)
    try:
        phases = {"prefill": (t, None), "decode": (1, name)}
        return {phase: engine.backends(config, params, cache, *asked) for phase, asked in phases.items()}
    except ValueError as error:
        raise InputError(f"--backend: {error}") from error


def products(params: Params) -> dict[str, int]:
    """Returns how many packed matrices each backend multiplies one row by, with their format."""
    x = jax.ShapeDtypeStruct
    dtype = params["text"]["embedding"].dtype
    chosen = ((choose(None, x((1, m.inputs), dtype), m), m) for m in weights.matrices(params))
    return dict(Counter(f"{backend} ({m.kind}, {m.bits} bits)" for backend, m in chosen))


def _dense_bytes(config: LlavaConfig, plan: Plan, capacity: int) -> int:
    return cache_bytes(config.text, uniform(config.text, cache=plan.cache), 1, capacity)


def _drops_of(stored: Checkpoint) -> list[dict[str, int]] | None:
    """Returns what is pruned from a checkpoint's weights; None if nothing is."""
    return _drops(stored.plan) if stored.plan is not None and stored.plan.prunes else None


def _drops(plan: Plan) -> list[dict[str, int]]:
    return [dict(layer.drop) for layer in plan.layers]
