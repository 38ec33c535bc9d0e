"""LoRA adapters: the merged weight, every spelling of its name, and what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_parts import write_adapter

from convert.lora import Merged
from convert.source import Arrays
from lmmjax.errors import InputError

Q = "model.layers.0.self_attn.q_proj"
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((32, 24)).astype(np.float32)
A, B = RNG.standard_normal((4, 24)).astype(np.float32), RNG.standard_normal((32, 4)).astype(np.float32)
SOURCE = Arrays({f"{Q}.weight": WEIGHT, "model.norm.weight": np.ones(24, np.float32)})


def expected(scale: float) -> np.ndarray:
    return WEIGHT + scale * np.einsum("or,ri->oi", B.astype(np.float64), A.astype(np.float64))


@pytest.mark.parametrize(("changes", "scale"), [({}, 2), ({"lora_alpha": 1}, 0.25), ({"use_rslora": True}, 4)])
def test_the_merged_weight(changes, scale: float, tmp_path: Path):
    merged = Merged(SOURCE, write_adapter(tmp_path / "lora", {Q: (A, B)}, **changes))
    assert merged.tensors == SOURCE.tensors
    np.testing.assert_allclose(merged.read(f"{Q}.weight"), expected(scale), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.read("model.norm.weight"), 1)


def test_the_scale_follows_the_rank_that_a_weight_has(tmp_path: Path):
    """`rank_pattern` gives some weights another rank than `r`; their factors show it."""
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)}, r=64, rank_pattern={"q_proj": 4})
    np.testing.assert_allclose(Merged(SOURCE, lora).read(f"{Q}.weight"), expected(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spelling",
    [
        f"base_model.model.{Q}",
        "base_model.model.layers.0.self_attn.q_proj",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj",
        Q,
    ],
)
def test_every_spelling_of_a_name(spelling: str, tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", {spelling: (A, B)}, prefix="")
    np.testing.assert_allclose(Merged(SOURCE, lora).read(f"{Q}.weight"), expected(2), rtol=1e-5, atol=1e-5)


def test_a_file_with_the_adapters_name_inside_its_tensors_names(tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)})
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({name.replace("_A.", "_A.default."): value for name, value in tensors.items()}, lora / "x.safetensors")
    got = Merged(SOURCE, lora / "x.safetensors").read(f"{Q}.weight")
    np.testing.assert_allclose(got, expected(2), rtol=1e-5, atol=1e-5)


def test_pytorch_files(tmp_path: Path):
    torch = pytest.importorskip("torch", reason=".bin files are torch's")
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)})
    tensors = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, lora / "adapter_model.bin")
    np.testing.assert_allclose(Merged(SOURCE, lora).read(f"{Q}.weight"), expected(2), rtol=1e-5, atol=1e-5)


def test_sums_are_float32_and_rounded_once(tmp_path: Path):
    half = Arrays({f"{Q}.weight": WEIGHT.astype(ml_dtypes.bfloat16)})
    small = (A.astype(np.float16) / 64, B.astype(np.float16))
    lora = write_adapter(tmp_path / "lora", {Q: small})
    exact = half.read(f"{Q}.weight").astype(np.float64) + 2 * small[1].astype(np.float64) @ small[0].astype(np.float64)
    kept, wide = Merged(half, lora), Merged(half, lora, "float32")
    assert kept.tensors[f"{Q}.weight"][1] == str(kept.read(f"{Q}.weight").dtype) == "bfloat16"
    np.testing.assert_allclose(wide.read(f"{Q}.weight"), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kept.read(f"{Q}.weight"), wide.read(f"{Q}.weight").astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True), ("alpha_pattern", {"q_proj": 3}), ("lora_bias", True), ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]), ("something_new", 3), ("peft_type", "IA3"), ("trainable_token_indices", [5]),
    ],
)  # fmt: skip
def test_settings_that_are_refused(name: str, value: Any, tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)}, **{name: value})
    with pytest.raises(InputError, match=re.escape(f"{name} = {value!r} is not handled; expected a plain LoRA")):
        Merged(SOURCE, lora)


@pytest.mark.parametrize("changes", [{"lora_alpha": None}, {"lora_alpha": "8"}, {"peft_type": None}])
def test_settings_that_must_be_there(changes, tmp_path: Path):
    with pytest.raises(InputError, match=r"lora_alpha|peft_type"):
        Merged(SOURCE, write_adapter(tmp_path / "lora", {Q: (A, B)}, **changes))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"model.layers.7.self_attn.q_proj": (A, B)}, "layers.7.self_attn.q_proj.weight has no weight in the model"),
        ({Q: (A[:, :-1].copy(), B)}, f"{Q}.weight is (32, 24), its factors are (4, 23) and (32, 4)"),
        ({Q: (A[:3], B)}, "its factors are (3, 24) and (32, 4)"),
        ({"model.norm": (A, B)}, "model.norm.weight is (24,), its factors"),
        ({Q: (A.astype(np.float64), B)}, "lora_A.weight is F64"),
        ({}, "the adapter holds no tensors"),
    ],
)
def test_factors_that_do_not_fit(factors, message: str, tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", factors)
    with pytest.raises(InputError, match=re.escape(message)):
        Merged(SOURCE, lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"base_model.model.{Q}.lora_B.weight": None}, "q_proj.weight has no lora_B"),
        ({"base_model.model.lm_head.weight": A}, "base_model.model.lm_head.weight is not handled"),
        ({f"{Q}.lora_A.weight": A}, f"{Q}.lora_A.weight: a second factor of its weight"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": A}, "lora_magnitude_vector is not handled"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, "lora_embedding_A is not handled"),
    ],
)
def test_tensors_that_are_refused(changes, message: str, tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)})
    file = lora / "adapter_model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    with pytest.raises(InputError, match=re.escape(message)):
        Merged(SOURCE, lora)


def test_files_that_are_missing(tmp_path: Path):
    lora = write_adapter(tmp_path / "lora", {Q: (A, B)})
    shutil.copytree(lora, tmp_path / "bare")
    (lora / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        Merged(SOURCE, lora)
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"):
        Merged(SOURCE, tmp_path / "bare")
    with pytest.raises(InputError, match="there is no file"):
        Merged(SOURCE, tmp_path / "absent.safetensors")
