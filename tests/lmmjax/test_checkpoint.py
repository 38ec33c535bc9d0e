"""A checkpoint directory describes itself, comes back as it was, and is refused when it is not whole."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import lmmjax.checkpoint
from lmmjax import weights
from lmmjax.checkpoint import cache_dir, load, resolve, save
from lmmjax.errors import InputError
from lmmjax.plan import uniform


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_load_gives_config_weights_and_no_plan(checkpoint: Path):
    loaded = load(checkpoint)
    assert loaded.config.text.kv_heads == 2
    assert loaded.plan is None
    assert loaded.params["text"]["layers_0"]["attn"]["q"]["kernel"].shape == (32, 32)
    assert dtypes(loaded.params) == {"float32"}


def test_load_casts_when_asked_and_to_float32_on_a_cpu(hf_checkpoint, tmp_path: Path):
    from convert import hf

    hf.convert(hf_checkpoint(dtype="bfloat16"), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "lmmjax.json").read_text())["dtypes"] == ["bfloat16"]
    expected = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert dtypes(load(tmp_path / "model").params) == {expected}
    assert dtypes(load(tmp_path / "model", "float16").params) == {"float16"}


def test_save_keeps_weights_plan_and_processor(checkpoint: Path, tmp_path: Path):
    loaded = load(checkpoint)
    plan = uniform(loaded.config.text, bits=4)
    save(tmp_path / "new", loaded.params, like=checkpoint, plan=plan)
    again = load(tmp_path / "new")
    assert again.plan == plan
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    about = {"lmmjax.json", "params"}
    assert names(tmp_path / "new") == names(checkpoint)
    for name in names(checkpoint) - about:
        assert (tmp_path / "new" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_save_goes_back_to_the_stored_dtype_unless_that_would_lose_something(hf_checkpoint, tmp_path: Path):
    from convert import hf

    hf.convert(hf_checkpoint(dtype="bfloat16"), tmp_path / "model")
    params = load(tmp_path / "model", "float32").params
    params["text"]["norm"]["scale"] = params["text"]["norm"]["scale"] + 1e-6
    params["text"]["embedding"] = params["text"]["embedding"].at[0].set(0)
    save(tmp_path / "new", params, like=tmp_path / "model", plan=None)
    stored = weights.leaves(tmp_path / "new" / "params")
    assert stored["text.norm.scale"].dtype == "float32"
    assert {str(leaf.dtype) for name, leaf in stored.items() if name != "text.norm.scale"} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "new", "float32").params, params)


def test_save_refuses_a_path_that_exists(checkpoint: Path, tmp_path: Path):
    with pytest.raises(InputError, match="exists"):
        save(tmp_path, {}, like=checkpoint, plan=None)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, hf_checkpoint):
    for path in (tmp_path, tmp_path / "absent", hf_checkpoint()):
        with pytest.raises(InputError, match="is no lmmjax checkpoint"):
            load(path)


@pytest.mark.parametrize("number", [3, None, "1", True, 0])
def test_another_format_is_refused(copy: Path, number):
    (copy / "lmmjax.json").write_text(json.dumps({"format": number}))
    with pytest.raises(InputError, match=r"format .*reads up to 2; update"):
        load(copy)


@pytest.mark.parametrize("gone", ["params", "params/00000/state/_METADATA", "params/00000/state/d"])
def test_half_a_checkpoint_is_refused(copy: Path, gone: str):
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        load(copy)


def test_a_file_cut_short_is_refused(copy: Path):
    largest = max((copy / "params").rglob("*"), key=lambda entry: entry.stat().st_size if entry.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(InputError, match="missing or cut short"):
        load(copy)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_description_is_refused(copy: Path, content: str):
    (copy / "lmmjax.json").write_text(content)
    with pytest.raises(InputError, match=r"lmmjax\.json"):
        load(copy)


def test_a_description_without_a_plan_is_refused(copy: Path):
    about = json.loads((copy / "lmmjax.json").read_text())
    del about["plan"]
    (copy / "lmmjax.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="no plan in it"):
        load(copy)


@pytest.mark.parametrize("content", [b"{}", b"[3]", b"\xff\xfe"])
def test_damaged_metadata_of_the_weights_are_one_line(copy: Path, content: bytes):
    file = copy / "params" / "00000" / "state" / "_METADATA"
    file.write_bytes(content.ljust(file.stat().st_size))
    with pytest.raises(InputError, match="the weights cannot be read"):
        load(copy)


def test_weights_in_many_parts_come_back_as_in_one(checkpoint: Path, tmp_path: Path, monkeypatch):
    params = load(checkpoint).params
    monkeypatch.setattr(weights, "_PART_BYTES", 5000)
    save(tmp_path / "parts", params, like=checkpoint, plan=None)
    assert len(list((tmp_path / "parts" / "params").iterdir())) > 10
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "parts").params, params)
    names = ["text.norm.scale", "vision.class_embed", "text.embedding"]
    assert set(weights.Reader(tmp_path / "parts" / "params").read(names)) == set(names)


def test_some_weights_are_read_without_the_others(checkpoint: Path):
    part = weights.Reader(checkpoint / "params").read(["text.norm.scale", "vision.class_embed"])
    assert set(part) == {"text.norm.scale", "vision.class_embed"}
    assert isinstance(part["text.norm.scale"], np.ndarray)


def test_resolve_gives_a_directory_or_the_command_that_makes_it(checkpoint: Path, hf_checkpoint, tmp_path: Path):
    assert resolve(str(checkpoint)) == checkpoint
    with pytest.raises(InputError, match="there is no directory"):
        resolve(str(tmp_path / "absent"))
    source = hf_checkpoint()
    with pytest.raises(InputError, match=f"python -m convert.hf {source} model-lmmjax"):
        resolve(str(source))


def test_the_embedded_model_is_converted_once(hf_checkpoint, tmp_path: Path, monkeypatch, capfd):
    source = hf_checkpoint()
    monkeypatch.setattr(lmmjax.checkpoint, "EMBEDDED", source)
    monkeypatch.setenv("LMMJAX_CACHE", str(tmp_path))
    first = resolve(None)
    assert first.is_relative_to(tmp_path)
    assert load(first).config.image_token == 3
    assert "converting the embedded model" in capfd.readouterr().err
    assert resolve(None) == first
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damaged", ["params/00000/state/_METADATA", "tokenizer.json", "lmmjax.json"])
def test_a_damaged_copy_of_the_embedded_model_is_made_again(
    damaged: str, hf_checkpoint, checkpoint: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(lmmjax.checkpoint, "EMBEDDED", hf_checkpoint())
    monkeypatch.setenv("LMMJAX_CACHE", str(tmp_path))

    def convert(command: list[str], **_) -> subprocess.CompletedProcess:
        shutil.copytree(checkpoint, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(lmmjax.checkpoint.subprocess, "run", convert)
    first = resolve(None)
    (first / damaged).write_bytes(b"{")
    assert resolve(None) == first
    assert (first / damaged).read_bytes() == (checkpoint / damaged).read_bytes()


def test_the_embedded_models_trouble_is_told(tmp_path: Path, monkeypatch):
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(lmmjax.checkpoint, "EMBEDDED", tmp_path / "source")
    monkeypatch.setenv("LMMJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"not converted .*config\.json"):
        resolve(None)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("LMMJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lmmjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lmmjax"
    monkeypatch.setenv("LMMJAX_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def dtypes(params) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}
