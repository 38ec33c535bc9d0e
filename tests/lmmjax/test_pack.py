"""python -m lmmjax.pack: what is packed says and does the same as before, is as small as said, and comes back dense."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save
from said import one_line

from convert import export, hf
from kernels.gpu import device
from kernels.weights import Matrix
from lmmjax import answer, engine, evaluate, llava, orders, weights
from lmmjax import checkpoint as checkpoints
from lmmjax.attention import causal
from lmmjax.errors import InputError
from lmmjax.joined import join_linears
from lmmjax.linears import kernels_of
from lmmjax.pack import __main__ as command
from lmmjax.prompt import pad


def weights_of(path: Path):
    return checkpoints.load(path).params


def packed(model: Path, out: Path, *words: str) -> Path:
    assert command.main(["--model", str(model), *words, str(out)]) == 0
    return out


def tokens_of(path: Path) -> list[list[int]]:
    """Greedy answers to two prompts of text."""
    model = checkpoints.load(path)
    tokens, lengths = pad([[5, 6, 7, 8, 9], [20, 21, 22]])
    return engine.generate(model.config, model.params, tokens, lengths, None, max_tokens=6)


@pytest.mark.parametrize("kind", ["bitmap", "2:4"])
def test_floats_packed_are_the_same_model(pruned, kind, tmp_path, capsys):
    small = packed(pruned[kind], tmp_path / "small")
    assert f"{kind} 32 0." in capsys.readouterr().out
    before, after = weights_of(pruned[kind]), weights_of(small)
    matrices = weights.matrices(after)
    assert {matrix.kind for matrix in matrices} == {kind}
    assert len(matrices) == 14
    for name, leaf in flatten_dict(after, sep=".").items():
        dense = leaf.dense() if isinstance(leaf, Matrix) else leaf
        np.testing.assert_array_equal(dense, flatten_dict(before, sep=".")[name], err_msg=name)
    assert tokens_of(small) == tokens_of(pruned[kind])


@pytest.mark.parametrize(
    "words", [(), ("--weights", "2:4", "--bits", "8"), ("--bits", "4", "--group", "16")], ids=" ".join
)
def test_a_permuted_pattern_is_packed_in_its_order(pruned, words, tmp_path, capsys):
    """Which, of inputs as they were, its zeros are not of."""
    small = packed(pruned["permuted"], tmp_path / "small", *words)
    assert "*: its inputs in an order of its own" in capsys.readouterr().out
    after, before = weights_of(small), weights_of(pruned["permuted"])
    assert {(matrix.kind, matrix.order is None) for matrix in weights.matrices(after)} == {("2:4", False)}
    for layer in ("layers_0", "layers_1"):
        for name, kernel in kernels_of(before["text"][layer]).items():
            dense = np.asarray(kernels_of(after["text"][layer])[name].dense())
            atol = 0 if not words else np.abs(kernel).max() / (100 if "8" in words else 7)
            np.testing.assert_allclose(dense, kernel, atol=atol, rtol=0, err_msg=name)
            assert not dense[np.asarray(kernel) == 0].any()
    attn = answer.load(small).params["text"]["layers_0"]["attn"]
    assert set(attn) == {"q", "k", "v", "o"}  # not joined: each reads its own order
    export.export(small, tmp_path / "dense")
    hf.convert(tmp_path / "dense", tmp_path / "again")
    assert tokens_of(small) == tokens_of(tmp_path / "again")


def test_a_permuted_pattern_is_a_bitmap_where_that_is_asked(pruned, tmp_path):
    small = packed(pruned["permuted"], tmp_path / "small", "--weights", "bitmap")
    assert {matrix.kind for matrix in weights.matrices(weights_of(small))} == {"bitmap"}
    assert tokens_of(small) == tokens_of(pruned["permuted"])


@pytest.mark.parametrize(
    ("of_q", "said"),
    [
        (None, "cannot be read"),
        (np.zeros(32, np.int32), "layers_0.q is no order of inputs"),
        (np.arange(32)[::-1].astype(np.float32), "layers_0.q is no order of inputs"),
        (np.arange(16)[::-1].copy(), "got an order of 16 inputs, expected 32"),
    ],
)
def test_an_order_that_is_none_is_one_line_and_leaves_nothing(pruned, of_q, said, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(pruned["permuted"], model)
    (model / orders.FILE).write_bytes(b"no tensors" if of_q is None else save({"layers_0.q": of_q}))
    assert command.main(["--model", str(model), str(tmp_path / "small")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert not (tmp_path / "small").exists()


def test_figures_are_those_of_the_files(pruned, tmp_path, capsys):
    small = packed(pruned["2:4"], tmp_path / "small", "--bits", "8")
    figures = json.loads((small / "packing.json").read_text())
    assert figures["nbytes"] == sum(matrix.nbytes for matrix in weights.matrices(weights_of(small)))
    kernels = [
        kernel for i in range(2) for kernel in kernels_of(weights_of(pruned["2:4"])["text"][f"layers_{i}"]).values()
    ]
    assert figures["dense_bytes"] == sum(kernel.nbytes for kernel in kernels)
    assert {row["kind"] for row in figures["linears"]} == {"2:4"}
    assert f"all {figures['share']:.3f}" in " ".join(capsys.readouterr().out.split())


def test_what_a_mask_does_not_pay_for_is_kept_whole_and_said(checkpoint, tmp_path, capsys):
    small = packed(checkpoint, tmp_path / "small", "--weights", "bitmap", "--bits", "4")
    assert {matrix.kind for matrix in weights.matrices(weights_of(small))} == {"dense"}
    assert "dense 4" in capsys.readouterr().out
    assert checkpoints.load(small).plan is None


def test_export_is_dense_again(pruned, tmp_path):
    export.export(packed(pruned["bitmap"], tmp_path / "small"), tmp_path / "exported")
    export.export(pruned["bitmap"], tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "expected"))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_codes_are_exported_in_the_models_dtype(hf_checkpoint, tmp_path):
    hf.convert(hf_checkpoint(dtype="bfloat16"), tmp_path / "model")
    export.export(packed(tmp_path / "model", tmp_path / "small", "--bits", "8", "--head", "8"), tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_of_8_bits_moves_logits_little(hf_checkpoint, tied, tmp_path):
    hf.convert(hf_checkpoint(text={"tie_word_embeddings": tied}), tmp_path / "model")
    small = packed(tmp_path / "model", tmp_path / "small", "--head", "8")
    before, after = checkpoints.load(tmp_path / "model"), checkpoints.load(small)
    leaf = after.params["text"]["embedding"] if tied else after.params["text"]["lm_head"]["kernel"]
    assert (leaf.kind, leaf.shape) == (("table", (264, 32)) if tied else ("dense", (32, 264)))
    assert engine.new_cache(after.config, after.params, None, 1, 16).layers[0][0].dtype == jnp.float32
    tokens = jnp.arange(5, 17).reshape(2, 6)

    def logits(model):
        x = llava.embed(model.config, model.params, tokens)
        states = llava.forward(model.config, model.params, x, jnp.tile(jnp.arange(6), (2, 1)), causal(2, 6))
        return np.asarray(llava.logits(model.config, model.params, states))

    expected, found = logits(before), logits(after)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_model_that_runs_has_its_linears_joined_and_says_the_same(pruned, tmp_path):
    small = packed(pruned["bitmap"], tmp_path / "small", "--bits", "8")
    stored, model = checkpoints.load(small), answer.load(small)
    assert set(model.params["text"]["layers_1"]["attn"]) == {"q_k_v", "o"}
    assert set(model.params["text"]["layers_1"]["mlp"]) == {"gate_up", "down"}
    tokens, lengths = np.array([[5, 9, 7, 11]]), np.array([4])
    states = [
        engine.decode(config, params, engine.start(config, params, tokens, lengths, max_tokens=12), 12)
        for config, params in ((stored.config, stored.params), model[:2])
    ]
    assert states[0].cache.lengths == states[1].cache.lengths == 15
    jax.tree.map(np.testing.assert_array_equal, states[0].cache.layers, states[1].cache.layers)
    np.testing.assert_array_equal(states[0].answer, states[1].answer)


def test_plain_linears_are_one_on_a_gpu(checkpoint):
    stored = checkpoints.load(checkpoint)
    attn = stored.params["text"]["layers_0"]["attn"]
    with device.speaking_of(device.EMULATED):
        params = join_linears(stored.config.text, weights_of(checkpoint))
    kernels = [attn[name]["kernel"] for name in "qkv"]
    np.testing.assert_array_equal(
        params["text"]["layers_0"]["attn"]["q_k_v"]["kernel"], jnp.concatenate(kernels, axis=1)
    )
    x = llava.embed(stored.config, stored.params, jnp.arange(5, 17).reshape(2, 6))
    states = [
        llava.forward(stored.config, one, x, jnp.tile(jnp.arange(6), (2, 1)), causal(2, 6))
        for one in (stored.params, params)
    ]
    np.testing.assert_allclose(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_linears_that_are_packed_in_unlike_ways_stay_apart(checkpoint, tmp_path):
    stored = checkpoints.load(packed(checkpoint, tmp_path / "small", "--bits", "8"))
    layer = stored.params["text"]["layers_0"]
    k = layer["attn"]["k"]["kernel"].dense()
    mixed = layer | {"attn": layer["attn"] | {"k": {"kernel": k}}}
    params = stored.params | {"text": stored.params["text"] | {"layers_0": mixed}}
    found = join_linears(stored.config.text, params)["text"]["layers_0"]
    assert found["attn"] is mixed["attn"]
    assert set(found["mlp"]) == {"gate_up", "down"}
    assert layer["mlp"]["up"]["kernel"].values.is_deleted()  # not held twice
    assert not layer["attn"]["q"]["kernel"].values.is_deleted()


def test_an_outline_has_the_shapes_of_what_is_loaded(pruned, tmp_path):
    small = packed(pruned["bitmap"], tmp_path / "small", "--bits", "4", "--group", "16", "--head", "4")
    outlined, loaded = checkpoints.outline(small).params, weights_of(small)
    assert jax.tree.structure(outlined) == jax.tree.structure(loaded)
    for shape, leaf in zip(jax.tree.leaves(outlined), jax.tree.leaves(loaded), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_an_answer_says_what_multiplies(pruned, tmp_path):
    model = answer.load(packed(pruned["bitmap"], tmp_path / "small", "--bits", "8"))
    found = answer.products(model.params)
    assert sum(found.values()) == 8  # of two layers: q, k and v are one, and so are gate and up
    assert all("(bitmap, 8 bits)" in name for name in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "2:4"], "--weights: text.layers_0.attn.q.kernel cannot be packed as 2:4"),
        (["--weights", "4:2"], "--weights, --group: kind: got '4:2', expected dense, bitmap or N:M"),
        (["--group", "32"], "--group: got 32 without scales to share"),
        (["--bits", "8", "--group", "0"], "group: got 0, expected at least 1"),
    ],
)
def test_bad_wishes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capfd, words, said):
    out = tmp_path / "small"
    assert command.main(["--model", str(checkpoint), *words, str(out)]) == 2
    assert said in capfd.readouterr().err
    assert not out.exists()


def test_packed_models_are_not_compressed_again(checkpoint, tmp_path, capsys):
    small = packed(checkpoint, tmp_path / "small", "--bits", "8")
    capsys.readouterr()
    assert command.main(["--model", str(small), str(tmp_path / "again")]) == 2
    assert "is packed already" in one_line(capsys)
    from lmmjax.prune import __main__ as prune

    assert prune.main(["--model", str(small), "--sparsity", "0.5", str(tmp_path / "pruned")]) == 2
    assert "compressed already" in one_line(capsys)


def test_damaged_facts_end_in_one_line(pruned, tmp_path):
    small = packed(pruned["2:4"], tmp_path / "small", "--bits", "8")
    file = small / "params" / weights.MATRICES
    for damaged in (file.read_text().replace('"2:4"', '"2:5"'), "[]".ljust(file.stat().st_size)):
        file.write_text(damaged)
        with pytest.raises(InputError, match=r"matrices\.json"):
            checkpoints.load(small)


def test_a_packed_model_is_no_baseline(pruned, tmp_path, capfd):
    small = packed(pruned["dense"], tmp_path / "small", "--bits", "8")
    words = ["--model", str(pruned["bitmap"]), "--baseline", str(small), "--task", "easy-vqa", "--limit", "1"]
    assert evaluate.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "is packed; give the directory of the dense checkpoint" in capfd.readouterr().err
