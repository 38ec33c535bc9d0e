"""The table of names holds in both directions, and every layout comes down to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import LAYOUTS, hf_config

from convert.fit import assign
from convert.names import LM_HEAD, PATCHES, TABLE, TRANSPOSED, Slot, canonical, slots
from lmmjax.config import from_hf
from lmmjax.errors import InputError

CONFIG = from_hf(hf_config())
FOUND = {slot.name: (slot.shape, "float32") for slot in slots(CONFIG)}


def test_the_table_is_one_to_one_and_every_row_is_used():
    ours = [place for place, _ in TABLE.values()]
    assert len(set(ours)) == len(ours)
    used = {slot.name.replace(f".{number}.", ".#.") for slot in slots(CONFIG) for number in range(3)}
    assert set(TABLE) <= used


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_down_to_the_hubs_names(layout: str):
    for slot in slots(CONFIG):
        assert canonical(LAYOUTS[layout](slot.name)) == slot.name


@pytest.mark.parametrize(
    "buffer",
    [
        "vision_tower.vision_model.embeddings.position_ids",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
    ],
)
def test_buffers_are_no_weights(buffer: str):
    assert canonical(buffer) is None
    assert buffer not in assign(CONFIG, {**FOUND, buffer: ((7,), "I64")}).values()


def test_one_layer_follows_the_other():
    names = [slot.leaf for slot in slots(from_hf(hf_config(text={"num_hidden_layers": 12})))]
    layers = list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith("text.layers_")))
    assert layers == [f"layers_{number}" for number in range(12)]
    places = [name.split(".")[:2] for name in names]
    assert places == sorted(places, key=places.index), "a layer's weights are not side by side"


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_both_directions_of_a_rule_undo_each_other(out: int, channels: int, rows: int, columns: int):
    matrix = np.arange(out * channels).reshape(out, channels)
    slot = Slot("theirs", "ours", matrix.shape, TRANSPOSED)
    assert slot.to_ours(matrix).shape == slot.our_shape == (channels, out)
    np.testing.assert_array_equal(slot.to_theirs(slot.to_ours(matrix)), matrix)
    patches = np.arange(out * channels * rows * columns).reshape(out, channels, rows, columns)
    slot = Slot("theirs", "ours", patches.shape, PATCHES)
    assert slot.to_ours(patches).shape == slot.our_shape
    np.testing.assert_array_equal(slot.to_theirs(slot.to_ours(patches)), patches)


def test_all_problems_are_told_at_once():
    found = dict(FOUND)
    del found["multi_modal_projector.linear_1.bias"]
    found["language_model.model.norm.weight"] = ((31,), "float32")
    found["language_model.model.layers.0.mlp.up_proj.weight"] = ((48, 32), "I8")
    found["stray.weight"] = ((1,), "float32")
    found["model.mm_projector.2.bias"] = ((32,), "float32")
    with pytest.raises(InputError) as caught:
        assign(CONFIG, found)
    for part in (
        "1 missing tensors: multi_modal_projector.linear_1.bias",
        "1 wrong shapes: language_model.model.norm.weight is (31,), expected (32,)",
        "1 dtypes not handled: language_model.model.layers.0.mlp.up_proj.weight is I8",
        "1 tensors without a place: stray.weight",
        "model.mm_projector.2.bias beside multi_modal_projector.linear_2.bias",
    ):
        assert part in str(caught.value)


def test_many_problems_of_a_kind_are_counted():
    with pytest.raises(InputError, match=r"80 missing tensors: .* and 70 more"):
        assign(CONFIG, {})


def test_a_tied_head_may_be_saved_twice_but_not_in_another_shape():
    tied = from_hf(hf_config(text={"tie_word_embeddings": True}))
    found = {slot.name: (slot.shape, "float32") for slot in slots(tied)}
    assert LM_HEAD not in found
    assert LM_HEAD not in assign(tied, found)
    assert LM_HEAD in assign(tied, {**found, LM_HEAD: ((264, 32), "float32")})
    with pytest.raises(InputError, match="wrong shapes"):
        assign(tied, {**found, LM_HEAD: ((32, 264), "float32")})
