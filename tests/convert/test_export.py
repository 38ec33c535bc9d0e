"""`python -m convert.export`: bit-identical tensors, transformers loads the result, atomic and sharded."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import hf_config, random_tensors, write_original
from tiny_checkpoints import write_hf as write_source

from convert import export, hf
from convert.names import EMBEDDING, LM_HEAD, slots
from convert.source import open_source
from convert.writing import write_hf
from lmmjax import llava
from lmmjax.checkpoint import load
from lmmjax.config import from_hf
from lmmjax.errors import InputError

VARIANTS = {
    "plain": {},
    "tied": {"text": {"tie_word_embeddings": True}},
    "list of features": {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"},
    "no projector bias": {"multimodal_projector_bias": False},
}


def assert_transformers_loads(directory: Path) -> None:
    pytest.importorskip("torch", reason="transformers' model is torch's")
    from transformers import LlavaForConditionalGeneration

    _, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    source = open_source(directory)
    return {name: source.read(name) for name in source.tensors}


def assert_identical(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert got[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, "float32") for variant in VARIANTS), ("plain", "bfloat16"), ("tied", "float16")]
)
def test_there_and_back_changes_no_bit(variant: str, dtype: str, tmp_path: Path):
    config = hf_config(**VARIANTS[variant])
    tensors = random_tensors(config, dtype=dtype)
    write_source(tmp_path / "source", config, tensors, layout="in memory", shards=2)
    hf.convert(tmp_path / "source", tmp_path / "model")
    assert export.main([str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    assert_identical(tensors_in(tmp_path / "back"), tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert_transformers_loads(tmp_path / "back")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype_that_weights_were_cast_to(key: str, tmp_path: Path):
    config = {**hf_config(text={key: "float16"}), key: "float16"}
    write_source(tmp_path / "source", config, random_tensors(config, dtype="float16"))
    hf.convert(tmp_path / "source", tmp_path / "model", dtype="bfloat16")
    export.export(tmp_path / "model", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == {**hf_config(text={key: "bfloat16"}), key: "bfloat16"}
    assert_transformers_loads(tmp_path / "back")


def test_shards_hold_what_one_file_holds(checkpoint: Path, tmp_path: Path):
    export.export(checkpoint, tmp_path / "one")
    export.export(checkpoint, tmp_path / "many", shard_bytes=100_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert_identical(tensors_in(tmp_path / "many"), load_file(tmp_path / "one" / "model.safetensors"))
    assert_transformers_loads(tmp_path / "many")


def test_an_image_token_behind_the_vocabulary_gets_its_row(tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=True, vocab_size=264)
    hf.convert(tmp_path / "source", tmp_path / "model", vision=clip)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    params = load(tmp_path / "model").params
    write_hf(params, {**raw, "image_token_index": 265}, tmp_path / "back")
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    for name, ours in ((EMBEDDING, params["text"]["embedding"]), (LM_HEAD, params["text"]["lm_head"]["kernel"].T)):
        np.testing.assert_array_equal(tensors[name][:264], ours)
        np.testing.assert_allclose(tensors[name][264:], np.tile(np.mean(ours, 0), (2, 1)), atol=1e-6)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]["vocab_size"] == 266
    assert_transformers_loads(tmp_path / "back")


def made_here() -> llava.Params:
    """Parameters as `llava.init` makes them: without what no forward pass reads."""
    shapes = jax.eval_shape(lambda: llava.init(from_hf(hf_config()), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def test_parameters_made_here_become_a_whole_checkpoint(checkpoint: Path, tmp_path: Path):
    raw, params = hf_config(), made_here()
    assert "post_norm" not in params["vision"]
    assert "layers_2" not in params["vision"]
    write_hf(params, raw, tmp_path / "made", [checkpoint / "tokenizer.json"])
    assert_transformers_loads(tmp_path / "made")
    assert (tmp_path / "made" / "tokenizer.json").exists()
    hf.convert(tmp_path / "made", tmp_path / "model")
    again = load(tmp_path / "model").params
    jax.tree.map(np.testing.assert_array_equal, {**params, "vision": None}, {**again, "vision": None})
    assert {slot.name for slot in slots(from_hf(raw))} == set(load_file(tmp_path / "made" / "model.safetensors"))


def test_parameters_that_do_not_fit_are_named(tmp_path: Path):
    params = made_here()
    del params["projector"]["linear_1"]["bias"]
    params["text"]["norm"]["scale"] = np.ones(3)
    params["stray"] = np.ones(3)
    with pytest.raises(InputError) as caught:
        write_hf(params, hf_config(), tmp_path / "made")
    for part in ("projector.linear_1.bias is missing", "stray is unknown", "text.norm.scale is (3,), expected (32,)"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["no checkpoint", "target exists"])
def test_bad_input_is_one_line_and_exit_code_2(case: str, checkpoint: Path, tmp_path: Path, capsys):
    source = checkpoint if case == "target exists" else tmp_path / "absent"
    target = tmp_path if case == "target exists" else tmp_path / "back"
    assert export.main([str(source), str(target)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())
