"""Generation: what a batch, a stride, a store or a bucket may not change, and what may not compile twice."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from small import CONFIG, encoded

from kernels.gpu import device
from lmmjax import engine, llava
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat, LayerPlan, Plan
from lmmjax.prompt import pad
from lmmjax.sample import Sampling

PLANS = {
    "dense": None,
    "mixed": Plan((LayerPlan(4, 2), LayerPlan(16, 8)), cache=CacheFormat(group=4, window=4, dtype="float32")),
    "before RoPE": Plan(
        (LayerPlan(3, 3), LayerPlan(6, 4)),
        cache=CacheFormat(
            group=4, sinks=1, metadata="float8", keys="before_rope", rotate_values="online", clip=True, dtype="float32"
        ),
    ),
    "images apart": Plan(
        (LayerPlan(6, 4, visual_key_bits=4, visual_value_bits=8), LayerPlan(8, 16, visual_value_bits=4)),
        cache=CacheFormat(group=4, visual_values="tokens", rotate_keys=True, dtype="float32"),
    ),
}


NAMES = [*list(PLANS)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(PLANS)[2:])]
"""Of all plans; the last two take most of the time that these tests spend on compiling."""
ONE = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=1))
"""Of a single layer, where its cache is the matter and both layers' would be alike."""


@pytest.fixture(scope="module")
def params() -> llava.Params:
    return llava.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def images(params: llava.Params) -> jax.Array:
    return engine.encode_images(CONFIG, params, encoded(3).pixels)


def prompts() -> list[list[int]]:
    """Returns three prompts of unequal lengths, each with the four tokens of one image."""
    samples = encoded(3)
    return [row[:length].tolist() for row, length in zip(samples.tokens, (7, 12, 10), strict=True)]


def decode(params: llava.Params, state: engine.State, steps: int) -> engine.State:
    """Returns the state after so many steps. The backend is given, as `generate` does: else it is another program."""
    return engine.decode(CONFIG, params, state, steps, None)


def room(name: str) -> engine.Room:
    """Returns the room that prompts of a bucket get for answers of 20 tokens: of one size, so programs are shared."""
    return engine.room(CONFIG, PLANS[name], 16, [4], 20)


@jax.jit
def next_token(params: llava.Params, tokens: jax.Array, length: jax.Array, image: jax.Array) -> jax.Array:
    """Returns the greedy token after the first `length`, with no cache and no loop: the whole forward pass."""
    x = llava.embed(CONFIG, params, tokens[None], image[None])
    mask = jnp.tril(jnp.ones((1, tokens.size, tokens.size), bool))
    states = llava.forward(CONFIG, params, x, jnp.arange(tokens.size)[None], mask)
    return llava.logits(CONFIG, params, states[0, length - 1]).argmax()


def by_hand(params: llava.Params, prompt: list[int], image: jax.Array, count: int) -> list[int]:
    """Returns the greedy answer, one whole forward pass a token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_token(params, pad([tokens], to=24)[0][0], len(tokens), image)))
    return tokens[len(prompt) :]


def test_greedy_answers_are_those_of_whole_forward_passes(params: llava.Params, images: jax.Array):
    got = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=9)
    assert got == [by_hand(params, prompt, image, 9) for prompt, image in zip(prompts(), images, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0, 0.95)])
def test_a_batch_of_unequal_prompts_answers_as_each_does_alone(
    params: llava.Params, images: jax.Array, name: str, sampling: Sampling
):
    keys = jax.random.split(jax.random.key(4), 3)
    settings = {"max_tokens": 20, "plan": PLANS[name], "sampling": sampling}
    together = engine.generate(CONFIG, params, *pad(prompts()), images, keys=keys, **settings)
    assert len({len(answer) for answer in together}) == 1
    for row, prompt in enumerate(prompts()):
        one = slice(row, row + 1)
        alone = engine.generate(CONFIG, params, *pad([prompt]), images[one], keys=keys[one], **settings)
        assert together[row] == alone[0]


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_padding_change_nothing(params: llava.Params, images: jax.Array, name: str):
    settings = {"max_tokens": 20, "plan": PLANS[name]}
    whole = engine.generate(CONFIG, params, *pad(prompts()), images, **settings)
    state = engine.start(CONFIG, params, *pad(prompts(), to=20), images, **settings)
    for steps in (1, 2, 5, 100):
        state = decode(params, state, steps)
    assert engine.answers(state) == whole
    assert state.done.all()


def test_an_answer_ends_with_its_end_and_leaves_the_others_alone(params: llava.Params, images: jax.Array):
    free = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=20)
    end = free[0][3]
    ended = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=20, eos=(end,))
    for answer, longer in zip(ended, free, strict=True):
        assert answer == longer[: longer.index(end) + 1 if end in longer else None]
    assert len(ended[0]) <= 4


def test_decoding_stops_when_all_rows_are_done(params: llava.Params, images: jax.Array):
    settings = {"max_tokens": 30}
    first = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=1)
    state = engine.start(CONFIG, params, *pad(prompts()), images, eos=[row[0] for row in first], **settings)
    assert state.done.all()
    state = decode(params, state, 30)
    assert engine.answers(state) == first
    assert state.cache.lengths.tolist() == [7, 12, 10]


def test_the_context_ends_an_answer(params: llava.Params, images: jax.Array):
    got = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=1000)
    # The last token is written, not read, so it needs no place.
    assert [len(answer) for answer in got] == [CONFIG.text.context + 1 - n for n in (7, 12, 10)]
    short = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, context=12))
    assert [len(row) for row in engine.generate(short, params, *pad(prompts()), images, max_tokens=9)] == [6, 1, 3]


def test_text_alone_needs_no_images(params: llava.Params):
    got = engine.generate(CONFIG, params, [[5, 6, 7]], [3], max_tokens=4)
    assert len(got[0]) == 4


def test_weights_in_bfloat16_keep_a_cache_in_bfloat16(params: llava.Params, images: jax.Array):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    state = engine.start(CONFIG, half, *pad(prompts()), images, max_tokens=8)
    assert state.cache.layers[0][0].dtype == jnp.bfloat16
    assert [len(row) for row in engine.answers(decode(half, state, 8))] == [8, 8, 8]


def test_padding_may_be_any_token(params: llava.Params, images: jax.Array):
    whole = engine.generate(CONFIG, params, *pad(prompts()), images, max_tokens=8)
    padded = pad(prompts(), pad_id=CONFIG.image_token)
    assert engine.generate(CONFIG, params, *padded, images, max_tokens=8) == whole


def test_nothing_of_the_caller_is_consumed(params: llava.Params, images: jax.Array):
    keys, sampling = jax.random.split(jax.random.key(1), 3), Sampling(jnp.float32(1.0), jnp.int32(3), jnp.float32(1.0))
    settings = {"max_tokens": 5, "keys": keys, "sampling": sampling}
    tokens, lengths = (jnp.asarray(x) for x in pad(prompts()))
    once = engine.generate(CONFIG, params, tokens, lengths, images, **settings)
    assert once == engine.generate(CONFIG, params, tokens, lengths, images, **settings)


def test_the_state_is_given_up_to_its_successor(params: llava.Params, images: jax.Array):
    state = engine.start(CONFIG, params, *pad(prompts()), images, max_tokens=8)
    kept = state.cache.layers[0][0].values
    decode(params, state, 1)
    assert kept.is_deleted()


def test_other_prompts_of_the_same_bucket_trace_nothing(
    params: llava.Params, images: jax.Array, monkeypatch: pytest.MonkeyPatch
):
    jax.clear_caches()
    traces = []
    extend = llava.extend
    monkeypatch.setattr(llava, "extend", lambda *args: traces.append(args[3].shape) or extend(*args))
    for cut in (0, 1, 2):
        shorter = [prompt[: len(prompt) - cut] for prompt in prompts()]
        for steps in (2, 7):
            state = engine.start(
                CONFIG,
                params,
                *pad(shorter),
                images,
                max_tokens=16 - cut,
                sampling=Sampling(0.5 * cut, cut, 1 - 0.1 * cut),
                eos=(cut,),
            )
            decode(params, state, steps)
    assert traces == [(3, 16, 32), (3, 1, 32)]


def test_prompts_are_checked(params: llava.Params, images: jax.Array):
    tokens, lengths = pad(prompts())
    with pytest.raises(InputError, match="12 image tokens, but the images make 8"):
        engine.start(CONFIG, params, tokens, lengths, images[:2], max_tokens=1)
    with pytest.raises(InputError, match="12 image tokens, but the images make 0"):
        engine.start(CONFIG, params, tokens, lengths, max_tokens=1)
    with pytest.raises(InputError, match="expected 1 to the context of 64"):
        engine.start(CONFIG, params, [[1] * 70], [65], max_tokens=1)
    with pytest.raises(InputError, match="got 0 to 0 tokens"):
        engine.start(CONFIG, params, [[1]], [0], max_tokens=1)


def test_the_backends_that_ran_are_named(params: llava.Params, images: jax.Array):
    state = engine.start(CONFIG, params, *pad(prompts()), images, max_tokens=8, plan=PLANS["mixed"])
    assert engine.backends(CONFIG, params, state.cache, 1) == ("reference",)
    with pytest.raises(ValueError, match="expected one of"):
        engine.start(CONFIG, params, *pad(prompts()), images, max_tokens=8, backend="none such")


@pytest.mark.slow
def test_a_kernel_in_the_decode_loop_answers_as_the_reference_does(params: llava.Params, images: jax.Array):
    """Interpreted on the CPU: prefill takes what can run, the loop's steps the kernel that was asked for."""
    form = CacheFormat(group=16, sinks=1, rotate_keys=True, rotate_values="online", clip=True, metadata="float8")
    plan = Plan((LayerPlan(4, 4), LayerPlan(16, 8)), cache=form).check(CONFIG.text)

    def answers(backend: str) -> list[list[int]]:
        state = engine.start(CONFIG, params, *pad(prompts()), images, max_tokens=6, plan=plan)
        with device.speaking_of(device.EMULATED):
            assert engine.backends(CONFIG, params, state.cache, 1, backend) == (backend,)
            return engine.answers(engine.decode(CONFIG, params, state, 5, backend))

    assert answers("triton") == answers("reference")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_whose_beginning_was_read_once_answer_as_whole_ones(params: llava.Params, images: jax.Array, name: str):
    """Rows 0 and 2 go on from the first prompt's image, row 1 from the second's; paddings differ."""
    settings = {"max_tokens": 20}
    first, second, _ = prompts()
    cut, at = 5, [0, 1, 0]
    rest = [first[cut:], second[cut:], [7, 8, 9, 10]]
    whole = [[first, second][row][:cut] + end for row, end in zip(at, rest, strict=True)]
    expected = engine.generate(CONFIG, params, *pad(whole), images[jnp.array(at)], plan=PLANS[name], **settings)
    cache = engine.new_cache(CONFIG, params, PLANS[name], 2, *room(name))
    cache = engine.read(CONFIG, params, cache, *pad([first[:cut], second[:cut]]), images[:2])
    past = engine.rows(cache, jnp.array(at))
    assert engine.generate(CONFIG, params, *pad(rest), past=past, **settings) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_continues_the_first(params: llava.Params, images: jax.Array, name: str):
    """The cache of an answered turn is the past of the next one: the same tokens as the whole talk as one prompt."""
    prompt, more = prompts()[0], [5, 6, 7]
    cache = engine.new_cache(CONFIG, params, PLANS[name], 1, *room(name))
    past = engine.read(CONFIG, params, cache, *pad([prompt[:-1]]), images[:1])
    state = engine.start(CONFIG, params, *pad([prompt[-1:]]), past=past, max_tokens=5)
    state = decode(params, state, 5)
    first = engine.answers(state)[0]
    # An answer's last token is not in the cache yet: it leads the next turn.
    second = engine.generate(CONFIG, params, *pad([[first[-1], *more]]), past=state.cache, max_tokens=6)
    settings = {"max_tokens": 20, "plan": PLANS[name]}
    whole = engine.generate(CONFIG, params, *pad([prompt + first + more]), images[:1], **settings)
    assert second[0] == whole[0][:6]


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_taken_back_leaves_no_trace(params: llava.Params, images: jax.Array, name: str):
    """A cache cropped to where it stood answers the same again, tokens that were rounded meanwhile apart."""
    prompt = prompts()[1]
    cache = engine.new_cache(CONFIG, params, PLANS[name], 1, *room(name))
    past = engine.read(CONFIG, params, cache, *pad([prompt[:-1]]), images[1:2])
    state = engine.start(CONFIG, params, *pad([prompt[-1:]]), past=past, max_tokens=3)
    state = decode(params, state, 3)
    back = state.cache.crop(jnp.array([len(prompt) - 1]))
    again = engine.generate(CONFIG, params, *pad([prompt[-1:]]), past=back, max_tokens=3)
    assert again == engine.answers(state)


def test_a_past_without_room_is_refused(params: llava.Params, images: jax.Array):
    """Before anything is computed or written over."""
    cache = engine.new_cache(CONFIG, params, PLANS["mixed"], 1, 12)
    past = engine.read(CONFIG, params, cache, *pad([prompts()[0]]), images[:1])
    with pytest.raises(InputError, match="cache: full: it has room for 12 tokens a row, 13 would be there"):
        engine.start(CONFIG, params, *pad([[1] * 6]), past=past, max_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [0, 3, 8])
def test_parts_are_filled_to_their_last_place_and_no_further(images: jax.Array, sinks: int):
    """Sinks that reach into the picture leave text its room; an answer ends where a part does."""
    form = CacheFormat(group=4, sinks=sinks, visual_values="tokens", dtype="float32")
    plan, params = Plan((LayerPlan(8, 8),), cache=form), llava.init(ONE, jax.random.key(0))
    prompt = [1, *[39] * 4, *range(2, 13)]
    exact = engine.generate(ONE, params, *pad([prompt]), images[:1], max_tokens=20)
    assert engine.generate(ONE, params, *pad([prompt]), images[:1], max_tokens=20, plan=plan) == exact
    cache = engine.new_cache(ONE, params, plan, 1, 48, images=16)
    past = engine.read(ONE, params, cache, *pad([prompt[:-1]]), images[:1])
    state = engine.start(ONE, params, *pad([prompt[-1:]]), past=past, max_tokens=40)
    state = engine.decode(ONE, params, state, 40)
    text = int(state.cache.lengths[0]) - 4
    assert text <= cache.layers[0][1].text.capacity == 32
    assert len(engine.answers(state)[0]) == 32 - 12 + 1


def test_room_for_images_apart_is_no_more_than_the_context():
    plan = PLANS["images apart"]
    assert engine.room(CONFIG, plan, 40, [16], 100) == (64, 16)
    assert engine.room(CONFIG, None, 40, [16], 100) == (64, 0)
