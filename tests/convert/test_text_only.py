"""Decoders alone, Llama and Mistral: the numbers of transformers' torch model, and no bit changed there and back."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import random_tensors
from tiny_texts import text_config, write_text, write_text_processor

from convert import export, hf
from convert.names import LM_HEAD, slots
from convert.source import open_source
from convert.writing import write_hf
from lmmjax import checkpoint, engine, llava
from lmmjax.config import LlavaConfig, from_hf
from lmmjax.errors import InputError
from lmmjax.prompt import pad

NEW = 32
PROMPTS = [[1, *range(40, 61)], [1, 200, 5, 77, 130]]
SHAPE = {"head_dim": 16, "rope_theta": 5e5, "max_position_embeddings": 64}
VARIANTS = {
    "llama": text_config(**SHAPE),
    "tied": text_config(tie_word_embeddings=True),
    # Longer than its window: the same model as the Llama up to there, so that one program serves both.
    "mistral": text_config("mistral", sliding_window=64, **{**SHAPE, "max_position_embeddings": 128}),
}


def made_by_transformers(directory: Path, config: dict, dtype: str = "float32") -> Path:
    """Writes what transformers saves of a model of random weights, scaled so that every part shows in the logits."""
    torch = pytest.importorskip("torch", reason="transformers' model is torch's")
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    torch.manual_seed(0)
    model = kind(kind.config_class(**config)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            wide = weight.ndim > 1
            weight.normal_(0 if wide else 1, weight.shape[-1] ** -0.5 if wide else 0.1)
            assert wide or "norm" in name
    model.save_pretrained(directory)
    write_text_processor(directory)
    return directory


@functools.partial(jax.jit, static_argnums=0)
def whole(config: LlavaConfig, params: llava.Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns the logits of right-padded prompts, without a cache."""
    b, t = tokens.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
    x = llava.embed_prompts(config, params, tokens, lengths, None)
    states = llava.forward(config, params, x, jnp.broadcast_to(jnp.arange(t), (b, t)), causal)
    return llava.logits(config, params, states)


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    source = open_source(directory)
    return {name: source.read(name) for name in source.tensors}


@pytest.mark.parametrize("variant", ["llama", "mistral"])
def test_logits_and_greedy_tokens_are_those_of_transformers(variant: str, tmp_path: Path):
    source = made_by_transformers(tmp_path / "source", VARIANTS[variant])
    import torch
    import transformers

    hf.convert(source, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    config, params = loaded.config, loaded.params
    assert set(params) == {"text"}
    assert config == from_hf(VARIANTS["llama"])
    tokens, lengths = pad(PROMPTS)
    logits = np.asarray(whole(config, params, tokens, lengths))
    answers = engine.generate(config, params, tokens, lengths, max_tokens=NEW)
    peer = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    assert type(peer).__name__ == VARIANTS[variant]["architectures"][0]
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            want = peer(ids).logits[0].numpy()
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert np.ptp(want) > 0.5, "logits this flat would hide a difference"
        np.testing.assert_allclose(logits[row, : len(prompt)], want, atol=1e-4, rtol=0)
        assert answers[row] == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("variant", "dtype"), [("llama", "bfloat16"), ("tied", "float16"), ("mistral", "float32")])
def test_there_and_back_changes_no_bit(variant: str, dtype: str, tmp_path: Path):
    source = made_by_transformers(tmp_path / "source", VARIANTS[variant], dtype)
    assert hf.main([str(source), str(tmp_path / "model")]) == 0
    assert export.main([str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    want, got = tensors_in(source), tensors_in(tmp_path / "back")
    assert set(got) == set(want) == {slot.name for slot in slots(from_hf(VARIANTS[variant]))}
    assert ("lm_head.weight" in got) == (variant != "tied")
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert got[name].tobytes() == tensor.tobytes(), name
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


def test_weights_that_were_cast_are_written_under_their_own_dtype(tmp_path: Path):
    config = text_config(torch_dtype="float32")
    source = write_text(tmp_path / "source", config)
    hf.convert(source, tmp_path / "model", dtype="float16")
    assert json.loads((tmp_path / "model" / "lmmjax.json").read_text())["dtypes"] == ["float16"]
    export.export(tmp_path / "model", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {**config, "torch_dtype": "float16"}


def test_parameters_made_here_become_a_whole_checkpoint(tmp_path: Path):
    raw = text_config()
    config = from_hf(raw)
    rng = np.random.default_rng(0)
    shapes = llava.shapes(config)
    params = {"text": _filled(shapes["text"], rng)}
    write_hf(params, raw, tmp_path / "made")
    written = tensors_in(tmp_path / "made")
    assert {slot.name: slot.shape for slot in slots(config)} == {name: of.shape for name, of in written.items()}
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], params["text"]["embedding"])
    np.testing.assert_array_equal(
        written["model.layers.1.mlp.down_proj.weight"], params["text"]["layers_1"]["mlp"]["down"]["kernel"].T
    )


def _filled(tree, rng: np.random.Generator):
    if isinstance(tree, dict):
        return {name: _filled(part, rng) for name, part in tree.items()}
    return rng.standard_normal(tree.shape, np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message", "options"),
    [
        ({"num_hidden_layers": 3}, {}, "9 missing tensors: model.layers.2.", ()),
        ({}, {"model.norm.weight": (31,)}, "model.norm.weight is (31,), expected (32,)", ()),
        ({}, {"vision_tower.vision_model.post_layernorm.bias": (32,)}, "1 tensors without a place: vision_tower", ()),
        ({"tie_word_embeddings": True}, {}, "lm_head.weight differs from the embedding", ()),
        ({"attention_bias": True}, {}, "attention_bias = True is not handled", ()),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}, "rope_parameters", ()),
        ({"model_type": "qwen2"}, {}, "model_type is 'qwen2'; expected 'llava' (LLaVA 1.5), or 'llama'", ()),
        ({}, {}, "is a decoder alone; leave it out", ("--vision", ".")),
    ],
)
def test_bad_input_is_one_line(config: dict, tensors: dict, message: str, options: tuple, tmp_path: Path, capsys):
    held = random_tensors(text_config()) | {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    source = write_text(tmp_path / "source", {**text_config(), **config}, held)
    assert hf.main([str(source), str(tmp_path / "out"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "convert:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_weights_spelled_as_part_of_a_llava_are_the_same(tmp_path: Path):
    tensors = random_tensors(text_config())
    whole = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    assert LM_HEAD in whole
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    for name, held in (("alone", tensors | buffer), ("part", whole)):
        hf.convert(write_text(tmp_path / name, text_config(), held), tmp_path / f"{name}-model")
    digests = [
        checkpoint.load(tmp_path / f"{name}-model").params["text"]["norm"]["scale"] for name in ("alone", "part")
    ]
    np.testing.assert_array_equal(*digests)


def test_a_decoder_without_its_tokenizer_is_refused(tmp_path: Path):
    source = write_text(tmp_path / "source", text_config())
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"neither tokenizer.json nor tokenizer.model"):
        hf.convert(source, tmp_path / "out")
