"""A loaded model's answers: the plan that is used, the text as it streams, what is reported."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from kernels.gpu import device
from lmmjax import answer, engine
from lmmjax.checkpoint import Checkpoint
from lmmjax.config import LINEARS
from lmmjax.errors import InputError
from lmmjax.plan import CacheFormat, Calibration, Plan, uniform
from lmmjax.prompt import Processor
from lmmjax.sample import GREEDY

DROP = {"q": 16, "k": 16, "v": 16, "o": 16, "gate": 8, "up": 8, "down": 24}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> answer.Model:
    return answer.load(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint: Path, model: answer.Model) -> Processor:
    return Processor.load(checkpoint, model.config)


def request_of(processor: Processor, max_tokens: int = 24, **changes) -> answer.Request:
    ids = processor.encode(processor.render("what?", 1), 1)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 28, 28)).astype(np.float32)
    return answer.Request(ids, pixels, max_tokens, GREEDY)._replace(**changes)


def plan_of(model: answer.Model, **changes) -> Plan:
    cache = CacheFormat(group=8, dtype="float32")
    return uniform(model.config.text, cache=cache, calibration=Calibration(samples=4), **changes)


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, model: answer.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A checkpoint that says it was compressed: every layer's first weight is gone, as a mark to know it by."""
    from lmmjax import checkpoint as checkpoints

    plan = plan_of(model, drop=DROP, bits=4)
    path = tmp_path_factory.mktemp("pruned") / "model"
    params = jax.tree.map(lambda x: x, model.params)
    params["text"]["layers_0"]["attn"]["q"]["kernel"] *= 0
    checkpoints.save(path, params, like=checkpoint, plan=plan)
    return path, plan


def test_without_a_plan_the_checkpoint_speaks_for_itself(checkpoint: Path, pruned: tuple[Path, Plan]):
    assert answer.load(checkpoint).plan is None
    assert answer.load(pruned[0]).plan == pruned[1]


def test_a_plan_of_the_cache_alone_leaves_the_weights(checkpoint: Path, model: answer.Model):
    plan = plan_of(model, bits=8)
    loaded = answer.load(checkpoint, plan)
    assert loaded.plan == plan
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_a_plan_that_prunes_is_replayed_on_dense_weights(checkpoint: Path, model: answer.Model):
    loaded = answer.load(checkpoint, plan_of(model, drop=DROP))
    for name in ("q", "k", "v", "o"):
        zeros = (np.asarray(loaded.params["text"]["layers_1"]["attn"][name]["kernel"]) == 0).sum(0)
        assert (zeros == DROP[name]).all()


def test_pruned_weights_take_another_cache_but_no_other_pruning(pruned: tuple[Path, Plan]):
    path, plan = pruned
    eight = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(layer, key_bits=8, value_bits=8) for layer in plan.layers)
    )
    loaded = answer.load(path, eight)
    assert loaded.plan == eight
    assert not np.asarray(loaded.params["text"]["layers_0"]["attn"]["q"]["kernel"]).any()
    other = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(layer, drop={**DROP, "q": 1}) for layer in plan.layers)
    )
    with pytest.raises(InputError, match="pruned by another plan"):
        answer.load(path, other)


def test_the_pieces_are_the_answer(model: answer.Model, processor: Processor):
    pieces: list[str] = []
    request = request_of(processor)
    result = answer.answer(model, processor, request, pieces.append)
    images = engine.encode_images(model.config, model.params, request.pixels)
    tokens = np.array([request.ids])
    whole = engine.generate(
        model.config, model.params, tokens, [tokens.size], images, max_tokens=24, eos=processor.eos
    )[0]
    assert "".join(pieces) == result.text == processor.decode(whole)
    assert len(pieces) > 2
    assert (result.tokens, result.prompt_tokens, result.images) == (len(whole), tokens.size, 1)


def test_no_piece_ends_inside_a_character(model: answer.Model, processor: Processor, monkeypatch: pytest.MonkeyPatch):
    ids = processor.tokenizer.encode("a é 漢 z", add_special_tokens=False)
    shown = iter([ids[:n] for n in range(1, len(ids) + 1)])
    monkeypatch.setattr(engine, "answers", lambda state: [next(shown)])
    monkeypatch.setattr(engine, "decode", lambda config, params, state, *_: _finished(state, shown))
    pieces: list[str] = []
    answer.answer(model, processor, request_of(processor), pieces.append)
    assert "".join(pieces) == "a é 漢 z"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def _finished(state: engine.State, shown) -> engine.State:
    """Returns the state, done once a single look is left."""
    return state.replace(done=state.done | (shown.__length_hint__() == 1))


def test_only_the_space_that_joins_it_to_the_prompt_is_taken_off():
    assert answer._settled(" red", True) == "red"
    assert answer._settled("  \n red", True) == " \n red"
    assert answer._settled("\n red", True) == "\n red"


def test_why_an_answer_stopped(model: answer.Model, processor: Processor, monkeypatch: pytest.MonkeyPatch):
    free = answer.answer(model, processor, request_of(processor), lambda _: None)
    assert (free.stopped, free.tokens) == ("length", 24)
    ids = engine.generate(
        model.config,
        model.params,
        np.array([request_of(processor).ids]),
        [len(request_of(processor).ids)],
        engine.encode_images(model.config, model.params, request_of(processor).pixels),
        max_tokens=24,
    )[0]
    ending = dataclasses.replace(processor, eos=(ids[4],))
    ended = answer.answer(model, ending, request_of(processor), lambda _: None)
    assert (ended.stopped, ended.tokens) == ("end", ids.index(ids[4]) + 1)


def test_ctrl_c_keeps_what_was_said(
    model: answer.Model, processor: Processor, interrupt_second_decode: Callable[[], None]
):
    whole = answer.answer(model, processor, request_of(processor), lambda _: None)
    interrupt_second_decode()
    result = answer.answer(model, processor, request_of(processor), lambda _: None)
    assert result.stopped == "interrupt"
    assert result.tokens == 2
    assert whole.text.startswith(result.text)


def test_bytes_are_those_of_the_buffers(model: answer.Model, processor: Processor):
    text = model.config.text
    dense = answer.answer(model, processor, request_of(processor), lambda _: None)
    assert (
        dense.kv_bytes
        == dense.kv_dense_bytes
        == text.layers * 2 * text.kv_heads * dense.kv_capacity * text.head_dim * 4
    )
    assert dense.weights_bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(model.params))
    packed = answer.answer(
        model._replace(plan=plan_of(model, bits=4)), processor, request_of(processor), lambda _: None
    )
    assert packed.kv_dense_bytes == text.layers * 2 * text.kv_heads * packed.kv_capacity * text.head_dim * 4
    assert packed.kv_bytes < packed.kv_dense_bytes
    assert packed.attention == {"prefill": ("reference",), "decode": ("reference",)}


def test_what_cannot_run_says_whose_fault_it_is(model: answer.Model, processor: Processor):
    with pytest.raises(InputError, match="--backend: backend: got 'fast'"):
        answer.answer(model, processor, request_of(processor, backend="fast"), lambda _: None)
    if device.current() is None:
        with pytest.raises(InputError, match=r"--backend: backend 'triton' cannot run .* needs a CUDA device"):
            answer.answer(model, processor, request_of(processor, backend="triton"), lambda _: None)


def test_times_leave_compiling_out(model: answer.Model, processor: Processor):
    jax.clear_caches()
    first = answer.answer(model, processor, request_of(processor), lambda _: None)
    second = answer.answer(model, processor, request_of(processor), lambda _: None)
    assert second.compile_ms == 0
    assert first.compile_ms > 50
    assert second.vision_ms > 0
    assert second.tokens_per_second == pytest.approx(1e3 * 23 / second.decode_ms)
    assert first.prefill_ms < first.compile_ms


def test_weights_that_carry_a_rotation_are_pruned_without_it(model: answer.Model, monkeypatch):
    """A plan's drops are those of the weights as they came: zeros in turned weights would be turned away."""
    from lmmjax.fold import fold_values

    folded = dataclasses.replace(plan_of(model, bits=4), cache=CacheFormat(rotate_values="folded"))
    stored = Checkpoint(Path("folded"), model.config, fold_values(model.config.text, model.params), folded)
    seen = []
    monkeypatch.setattr("lmmjax.prune.replay.replay", lambda given, plan: seen.append(given) or given.params)
    drop = {**dict.fromkeys(LINEARS, 0), "v": 2}
    pruned = answer.compress(stored, uniform(model.config.text, drop=drop))
    assert seen[0].plan is None
    for got in (seen[0].params, pruned.params):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
