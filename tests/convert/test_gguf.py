"""GGUF files: weights, config and tokenizer as transformers' own loader has them, and what is refused."""

import json
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_parts
from gguf import GGMLQuantizationType as Kind
from tiny_parts import TURNS, write_gguf
from tokenizers import Tokenizer

from convert.gguf import Gguf
from convert.gguf_tokenizer import write_tokenizer
from lmmjax.errors import InputError

TEXTS = [*tiny_parts.LINES[:3], "<|start|>Paris costs 6 apples\n<|stop|>", "x = 12345 # 東京 🎉", "it's naïve", " a  b"]


def tokenizer_of(file: Path, directory: Path):
    from transformers import AutoTokenizer

    directory.mkdir()
    write_tokenizer(Gguf(file).metadata, directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_weights_are_what_was_written(kind: Kind, tmp_path: Path):
    wanted = np.random.default_rng(3).standard_normal((64, 96)).astype(np.float32)
    source = Gguf(write_gguf(tmp_path / "a.gguf", kind, tensors={"blk.1.ffn_down.weight": wanted}))
    name = "model.layers.1.mlp.down_proj.weight"
    got = source.read(name)
    assert source.tensors[name] == ((64, 96), str(got.dtype))
    assert str(got.dtype) == {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    step = {Kind.F32: 0, Kind.F16: 2e-3, Kind.BF16: 2e-2, Kind.Q8_0: 0.02, Kind.Q5_1: 0.2}.get(kind, 0.5)
    np.testing.assert_allclose(got.astype(np.float32), wanted, atol=step, rtol=0)


def test_the_rows_of_q_and_k_go_back_to_halves(tmp_path: Path):
    """In a head of 16 rows, GGUF's rows 0, 1, 2, 3 are Hugging Face's 0, 8, 1, 9."""
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, 1)
    source = Gguf(
        write_gguf(tmp_path / "a.gguf", tensors={"blk.0.attn_q.weight": rows, "blk.0.attn_k.weight": rows[:32]})
    )
    order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
    for part, heads in (("q", 4), ("k", 2)):
        got = source.read(f"model.layers.0.self_attn.{part}_proj.weight")[:, 0]
        np.testing.assert_array_equal(got, (16 * np.arange(heads)[:, None] + order).ravel())


@pytest.mark.parametrize(("kind", "tied"), [(Kind.F16, False), (Kind.Q4_1, True), (Kind.Q8_0, False)])
def test_logits_are_those_of_transformers_own_loader(kind: Kind, tied: bool, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="transformers loads GGUF files with torch alone")
    pytest.importorskip("accelerate", reason="transformers loads GGUF files with it alone")
    import transformers

    from convert import assemble
    from lmmjax import checkpoint, llava

    file = write_gguf(tmp_path / "a.gguf", kind, tied=tied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    clip = tiny_parts.write_clip(tmp_path / "clip", tiny_parts.tensors())
    assemble.assemble(clip, file, tmp_path / "out", random_projector=0)
    loaded = checkpoint.load(tmp_path / "out", "float32")
    ids = np.random.default_rng(0).integers(4, 300, (2, 20))
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(ids)).logits.numpy()

    @jax.jit
    def ours(params):
        x = llava.embed(loaded.config, params, jnp.asarray(ids))
        positions, causal = jnp.tile(jnp.arange(20), (2, 1)), jnp.tril(jnp.ones((2, 20, 20), bool))
        return llava.logits(loaded.config, params, llava.forward(loaded.config, params, x, positions, causal))

    assert np.ptp(want) > 0.5, "logits this flat would hide a difference"
    np.testing.assert_allclose(ours(loaded.params), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind in gguf.quants._type_traits], ids=lambda kind: kind.name
)
def test_every_type_that_the_package_dequantizes(kind: Kind, tmp_path: Path):
    """From random blocks, whose scales are finite: no other package can write most of these types."""
    size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (64, 512 // size[0] * size[1]), np.uint8) & 0xBB
    name = "blk.0.ffn_down.weight"
    file = write_gguf(tmp_path / "a.gguf", tensors={name: raw}, raw_kinds={name: kind})
    got = Gguf(file).read("model.layers.0.mlp.down_proj.weight")
    assert got.shape == (64, 512)
    np.testing.assert_array_equal(got.astype(np.float32), gguf.dequantize(raw, kind))


def test_the_config(tmp_path: Path):
    settings = Gguf(write_gguf(tmp_path / "a.gguf", tied=True)).settings
    expected = {
        "model_type": "llama", "vocab_size": 319, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "rope_theta": 5e4, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert settings == {**expected, "rms_norm_eps": pytest.approx(1e-5)}
    assert not Gguf(write_gguf(tmp_path / "b.gguf")).settings["tie_word_embeddings"]


@pytest.mark.parametrize("pre", ["smollm", None, "llama-bpe", "tekken", "qwen2", "SentencePiece"])
def test_ids_are_those_of_transformers_own_loader(pre: str | None, tmp_path: Path):
    pytest.importorskip("torch", reason="transformers reads GGUF files with torch alone")
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "a.gguf", vocabulary="llama" if pre == "SentencePiece" else "gpt2", pre=pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = tokenizer_of(file, tmp_path / "ours")
    for text in TEXTS:
        if (pre, text) != ("smollm", TEXTS[1]):  # see the next test
            assert ours.encode(text) == theirs.encode(text), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_smollm_splits_digits_off_before_anything_else(tmp_path: Path):
    """As SmolLM's own tokenizer does. transformers takes GPT-2's splitting, which cuts the spaces before a number."""
    metadata = Gguf(write_gguf(tmp_path / "a.gguf")).metadata
    metadata["tokenizer.ggml.merges"] = ["Ġ Ġ"]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "ĠĠ"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    write_tokenizer(metadata, tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a  12").tokens
    assert ids == ["a", "ĠĠ", "1", "2"]


def test_scored_vocabularies_merge_the_best_first_and_begin_with_bos(tmp_path: Path):
    ours = tokenizer_of(write_gguf(tmp_path / "a.gguf", vocabulary="llama"), tmp_path / "ours")
    ids = ours.encode("the ☃")
    assert ids[0] == ours.bos_token_id
    assert ours.convert_ids_to_tokens(ids[1:2]) == ["▁the"]
    assert ours.convert_ids_to_tokens(ids[-3:]) == ["<0xE2>", "<0x98>", "<0x83>"]
    assert ours.decode(ids, skip_special_tokens=True) == "the ☃"


def test_ends_and_template(tmp_path: Path):
    extra = {"tokenizer.ggml.eot_token_id": 3}
    file = write_gguf(tmp_path / "a.gguf", metadata=extra)
    write_tokenizer(Gguf(file).metadata, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 2}
    assert (tmp_path / "chat_template.jinja").read_text() == TURNS


WRONG = np.zeros((64, 64), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"general.architecture": "qwen2"}}, "general.architecture is 'qwen2'; expected 'llama'"),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, "llama.rope.scaling.type = 'linear' is not handled"),
        ({"metadata": {"llama.rope.scaling.factor": 2.0}}, "llama.rope.scaling.factor = 2.0 is not handled"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count = 8 is not handled"),
        ({"metadata": {"llama.rope.dimension_count": 5, "llama.attention.key_length": 5}}, "head_dim = 5 is"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count = 8 is not handled"),
        ({"metadata": {"llama.attention.sliding_window": 8}}, "llama.attention.sliding_window = 8 is not handled"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 1]}}, "num_key_value_heads = [2, 1] is not handled"),
        ({"metadata": {"llama.block_count": None}}, "no llama.block_count in its metadata"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts; expected one file"),
        ({"tensors": {"token_embd.weight": WRONG}}, "319 tokens, but 64 embeddings"),
        ({"tensors": {"rope_freqs.weight": WRONG[0]}}, "rope_freqs.weight has no place in a plain Llama; scaled"),
        ({"tensors": {"blk.0.attn_q.bias": WRONG[0]}}, "blk.0.attn_q.bias has no place in a plain Llama"),
        ({"tensors": {"blk.0.attn_q.weight": WRONG.astype(np.int8)}, "raw_kinds": {"blk.0.attn_q.weight": Kind.I8}},
            "blk.0.attn_q.weight is of type I8, which the package gguf does not dequantize"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message: str, tmp_path: Path):
    file = write_gguf(tmp_path / "a.gguf", **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        Gguf(file)


def test_a_type_that_nobody_knows(tmp_path: Path):
    name = "blk.0.attn_q.weight"
    file = write_gguf(tmp_path / "a.gguf")
    content = file.read_bytes()
    at = content.index(name.encode()) + len(name) + 4 + 16  # behind the number of dimensions and the two
    file.write_bytes(content[:at] + (99).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight is of type 99"):
        Gguf(file)


@pytest.mark.parametrize("keep", [0, 3, 40, 900, 0.5, 0.99])
def test_a_file_cut_short(keep: float, tmp_path: Path):
    file = write_gguf(tmp_path / "a.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        Gguf(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "exaone"}, "tokenizer.ggml.pre is 'exaone', which is not handled; expected one of"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model is 'bert'"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 9999}}, "eos_token_id is 9999; there are 319 tokens"),
        ({"metadata": {"tokenizer.ggml.merges": ["a zebra"]}}, "its tokenizer contradicts itself"),
        ({"metadata": {"tokenizer.ggml.token_type": [1]}}, "its tokenizer contradicts itself"),
        ({"metadata": {"tokenizer.ggml.merges": ["a"]}}, "merges is absent, or holds other things"),
        ({"vocabulary": "llama", "metadata": {"tokenizer.ggml.scores": [1.0]}}, "scores is absent or of another"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_refused(changes, message: str, tmp_path: Path):
    metadata = {**Gguf(write_gguf(tmp_path / "a.gguf", **{**changes, "metadata": {}})).metadata}
    metadata.update(changes.get("metadata", {}))
    with pytest.raises(InputError, match=message):
        write_tokenizer(metadata, tmp_path)
