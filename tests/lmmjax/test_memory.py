"""Bytes said beforehand are those of the buffers that are then made: weights and caches, part by part."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, encoded

from convert import hf
from lmmjax import answer, engine, llava
from lmmjax import checkpoint as checkpoints
from lmmjax.config import LlavaConfig, TextConfig, VisionConfig
from lmmjax.errors import InputError
from lmmjax.memory import memory_report
from lmmjax.plan import BITS, CacheFormat, LayerPlan, Plan, uniform

SMALL = CacheFormat(group=4, dtype="float32")
PLANS = {
    "no plan": None,
    **{f"{bits} bits": uniform(CONFIG.text, bits=bits, cache=SMALL) for bits in BITS},
    "mixed": Plan((LayerPlan(8, 2), LayerPlan(16, 3)), cache=CacheFormat(group=8, window=8)),
    "sinks": Plan((LayerPlan(4, 4), LayerPlan(2, 16)), cache=dataclasses.replace(SMALL, sinks=3, window=4)),
    "small scales": uniform(CONFIG.text, bits=4, cache=dataclasses.replace(SMALL, metadata="float8")),
    "images apart": Plan((LayerPlan(8, 4, visual_key_bits=2), LayerPlan(4, 4, visual_value_bits=16)), cache=SMALL),
}
VICUNA_7B = LlavaConfig(
    vision=VisionConfig(width=1024, ffn=4096, layers=24, heads=16, image_size=336, patch_size=14, feature_layers=(23,)),
    text=TextConfig(
        vocab=32064, width=4096, ffn=11008, layers=32, heads=32, kv_heads=32, head_dim=128, context=4096, eps=1e-5
    ),
    image_token=32000,
)
"""The shape of llava-hf/llava-1.5-7b-hf."""


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peak_kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="module")
def params():
    return llava.init(CONFIG, jax.random.key(0))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_every_layer_of_the_cache_takes_what_is_said(name, batch, params):
    plan = PLANS[name]
    report = memory_report(CONFIG, plan, batch, 18, params=params, images=4)
    cache = engine.new_cache(CONFIG, params, plan, batch, 18, 4)
    assert (report.context, report.capacity) == (18, cache.capacity)
    for said, (keys, values) in zip(report.layers, cache.layers, strict=True):
        assert said.keys.total == nbytes(keys)
        assert said.values.total == nbytes(values)
        assert dataclasses.asdict(said.keys) == keys.sizes
    assert report.kv.total == nbytes(cache.layers) == cache.nbytes
    assert report.images == (4 if name == "images apart" else 0)
    numbers = 2 * CONFIG.text.layers * batch * CONFIG.text.kv_heads * cache.capacity * CONFIG.text.head_dim
    assert report.bits_per_element == 8 * nbytes(cache.layers) / numbers
    dense = engine.new_cache(CONFIG, params, plan and uniform(CONFIG.text, cache=plan.cache), batch, cache.capacity)
    assert report.kv_dense == nbytes(dense.layers)


def test_codes_scales_and_exact_tokens_are_told_apart():
    """By hand: 24 tokens of 2 heads of 8 channels, groups of 4, keys with a scale and a zero a channel."""
    report = memory_report(CONFIG, uniform(CONFIG.text, bits=4, cache=SMALL), 1, 24)
    keys, values = report.layers[1].keys, report.layers[1].values
    assert keys.codes == 24 * 2 * 8 // 2
    assert keys.scales == values.scales == 24 * 2 * 8 // 4 * 2 * 2
    assert keys.exact == 4 * 2 * 8 * 4  # a ring of one group in float32; values need none
    assert values.exact == 0
    dense = memory_report(CONFIG, uniform(CONFIG.text, cache=SMALL), 1, 24).layers[0]
    assert (dense.keys.codes, dense.keys.scales, dense.keys.exact) == (0, 0, 24 * 2 * 8 * 4)


@pytest.mark.parametrize("name", ["no plan", "mixed", "images apart"])
def test_the_cache_that_an_answer_starts_with(name, params):
    samples, plan = encoded(3), PLANS[name]
    images = llava.encode_images(CONFIG, params, jnp.asarray(samples.pixels))
    state = engine.start(CONFIG, params, samples.tokens, samples.lengths, images, max_tokens=9, plan=plan)
    apart = plan is not None and plan.splits_images
    room = 4 if apart else 0
    longest = int(samples.lengths.max()) - room if apart else samples.tokens.shape[1]
    capacity = engine.cache_capacity(CONFIG, longest, 9) + room
    report = memory_report(CONFIG, plan, 3, 25, params=params, capacity=capacity, images=4)
    assert (report.kv.total, report.capacity) == (nbytes(state.cache.layers), state.cache.capacity)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": {"tie_word_embeddings": True}},
        {"vision_feature_layer": [-3, -2]},
        {"multimodal_projector_bias": False},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_weights_of_a_checkpoint(changes, hf_checkpoint, tmp_path):
    """Whole and part by part: of the loaded arrays, of the outline, and of the config alone."""
    hf.convert(hf_checkpoint(**changes), tmp_path / "model")
    loaded, outline = checkpoints.load(tmp_path / "model"), checkpoints.outline(tmp_path / "model")
    assert (outline.config, outline.plan) == (loaded.config, loaded.plan)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), loaded.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), outline.params) == described
    dtype = str(loaded.params["text"]["embedding"].dtype)
    planned = llava.shapes(loaded.config, dtype)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == described
    report = memory_report(loaded.config, None, 1, 16, dtype)
    assert report == memory_report(loaded.config, None, 1, 16, params=outline.params)
    text = loaded.params["text"]
    assert report.weights == nbytes(loaded.params)
    assert report.parts["vision"] == nbytes(loaded.params["vision"])
    assert report.parts["projector"] == nbytes(loaded.params["projector"])
    assert [layer.weights for layer in report.layers] == [nbytes(text["layers_0"]), nbytes(text["layers_1"])]
    assert ("text.lm_head" in report.parts) == ("lm_head" in text)
    head = text["embedding"] if loaded.config.text.tied else text["lm_head"]
    assert report.step_weights == nbytes([text["layers_0"], text["layers_1"], text["norm"], head])


def test_pruned_weights_are_counted_with_their_zeros(checkpoint, tmp_path):
    dense = checkpoints.load(checkpoint)
    plan = uniform(dense.config.text, drop=dict.fromkeys(LayerPlan().drop, 8), bits=4, cache=SMALL)
    zeros = jax.tree.map(np.zeros_like, dense.params)
    checkpoints.save(tmp_path / "pruned", zeros, like=checkpoint, plan=plan)
    outline, loaded = (read(tmp_path / "pruned") for read in (answer.outline, answer.load))
    assert outline.plan == loaded.plan == plan
    report = memory_report(outline.config, outline.plan, 1, 16, params=outline.params)
    assert report.weights == nbytes(loaded.params) == nbytes(dense.params)
    with pytest.raises(InputError, match="pruned by another plan"):
        answer.outline(tmp_path / "pruned", uniform(dense.config.text))


def test_the_embedded_model(tmp_path):
    hf.convert(checkpoints.EMBEDDED, tmp_path / "tiny")
    loaded = checkpoints.load(tmp_path / "tiny")
    plan = uniform(loaded.config.text, bits=3)
    for batch in (1, 3):
        report = memory_report(loaded.config, plan, batch, 250, "float32")
        assert report.weights == nbytes(loaded.params)
        assert report.kv.total == nbytes(engine.new_cache(loaded.config, loaded.params, plan, batch, 250).layers)
        assert (report.context, report.capacity) == (250, 256)


def test_llava_7b_is_what_its_papers_and_files_say_and_nothing_is_made():
    """Published: 7.06 G weights, 6.74 G of them the decoder's; 512 KiB of keys and values a token in bfloat16."""
    arrays, peak = len(jax.live_arrays()), peak_kilobytes()
    report = memory_report(VICUNA_7B, None, 1, 4096)
    packed = memory_report(VICUNA_7B, uniform(VICUNA_7B.text, bits=4), 32, 4096)
    assert len(jax.live_arrays()) == arrays
    assert peak_kilobytes() - peak < 10**6  # of 14 GB and 21 GB
    assert report.weights == 2 * 7_063_427_072
    decoder = report.weights - report.parts["vision"] - report.parts["projector"]
    assert decoder == 2 * 6_738_939_904
    assert report.step_weights == 2 * 6_607_605_760
    assert report.kv.total == report.kv_dense == 4096 * 512 * 2**10
    assert report.total == report.weights + 4096 * 512 * 2**10
    assert report.tokens_where_kv_is(2) == -(-report.weights // (512 * 2**10)) == 26_945
    # 4 bits a code, 2 x 16 bits for 32 codes, and the keys' ring of 32 tokens of 4096.
    assert packed.bits_per_element == 4 + 1 + 16 * 32 / 4096 / 2


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("share", [2, 10])
def test_where_the_cache_begins_to_matter(share, dense):
    plan = uniform(CONFIG.text, bits=2, cache=SMALL)
    tokens = memory_report(CONFIG, plan, 1, 16).tokens_where_kv_is(share, dense)
    rows = -(-tokens // 16)
    assert rows > 1
    for batch, reached in ((rows, True), (rows - 1, False)):
        report = memory_report(CONFIG, plan, batch, 16)
        kv = report.kv_dense if dense else report.kv.total
        assert (share * kv >= kv + report.weights) == reached
        assert report.tokens_where_kv_is(share, dense) == tokens


def test_as_json_it_holds_the_sums():
    report = memory_report(CONFIG, PLANS["mixed"], 2, 20)
    raw = json.loads(json.dumps(report.to_dict()))
    assert raw["weights"] + raw["kv"]["total"] == raw["total"] == report.total
    assert sum(layer["kv"]["total"] for layer in raw["layers"]) == raw["kv"]["total"]
    assert raw["kv"]["codes"] + raw["kv"]["scales"] + raw["kv"]["exact"] == raw["kv"]["total"]
    assert sum(raw["parts"].values()) + sum(layer["weights"] for layer in raw["layers"]) == raw["weights"]
    assert raw["layers"][1]["key_bits"] == [16, 16]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "got batch 0, context 8, images 0"),
        ({"context": 0}, "got batch 1, context 0"),
        ({"images": 9}, "images 9"),
        ({"plan": Plan((LayerPlan(),))}, "got 1 layers, expected the model's 2"),
    ],
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        memory_report(CONFIG, **{"plan": None, "batch": 1, "context": 8, **changes})
