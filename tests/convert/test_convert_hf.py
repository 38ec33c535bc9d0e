"""`python -m convert.hf`: every layout and file format, each kind of bad input, and a crash half way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from tiny_checkpoints import LAYOUTS, hf_config, random_tensors, write_hf, write_original, write_weights

from convert import hf, original, parts
from convert.names import EMBEDDING, LM_HEAD, slots
from convert.source import Arrays
from lmmjax.checkpoint import load
from lmmjax.config import from_hf
from lmmjax.errors import InputError
from lmmjax.prompt import Processor

CONFIG = hf_config()
TENSORS = random_tensors(CONFIG)
NORM = "language_model.model.norm.weight"

KILLED = """
import os, signal, sys
from convert import hf
from lmmjax import weights
def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)
weights.Writer.finish = kill
hf.main(sys.argv[1:])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of this test's own, to be damaged."""
    write_hf(tmp_path / "source", CONFIG, TENSORS)
    return tmp_path / "source"


def assert_holds(path: Path, tensors: dict[str, np.ndarray]) -> None:
    leaves = flatten_dict(load(path).params, sep=".")
    expected = {slot.leaf: slot.to_ours(tensors[slot.name]) for slot in slots(load(path).config)}
    assert set(leaves) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(leaves[name], array.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "original"])
def test_every_layout(layout: str, shards: int, tmp_path: Path):
    write_hf(tmp_path / "source", CONFIG, TENSORS, layout=layout, shards=shards)
    assert hf.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert_holds(tmp_path / "out", TENSORS)


@pytest.mark.parametrize("inside", [True, False])
def test_the_original_layout(inside: bool, tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=inside)
    assert hf.main([str(tmp_path / "source"), str(tmp_path / "out"), "--vision", str(clip)]) == 0
    assert_holds(tmp_path / "out", TENSORS)
    assert load(tmp_path / "out").config == from_hf(CONFIG)
    processor = Processor.load(tmp_path / "out", load(tmp_path / "out").config)
    assert processor.render("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"


def test_the_original_gets_an_image_token_behind_its_vocabulary(tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=False, vocab_size=264)
    tokenizer = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    tokenizer["model"]["vocab"] = {
        token if token != "<image>" else "another": number for token, number in tokenizer["model"]["vocab"].items()
    }
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(tokenizer))
    hf.convert(tmp_path / "source", tmp_path / "out", vision=clip)
    config = load(tmp_path / "out").config
    assert config.image_token == 260
    assert 260 in Processor.load(tmp_path / "out", config).encode("<image> a", 1)


def test_the_originals_settings_are_translated():
    raw = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "vocab_size": 9}
    vision = original._vision_config({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, None)
    decoder = original.decoder_settings({**raw, "mm_vision_select_feature": "cls_patch"})
    config = from_hf(parts.config(vision, parts.Decoder(weights=Arrays({}), directory=Path(), **decoder), 8))
    assert (config.vision.image_tokens, config.vision.feature_layers, config.image_token) == (577, (23,), 8)
    with pytest.raises(InputError, match="mm_projector_type = 'linear', mm_vision_select_feature = 'x' is not handled"):
        original.decoder_settings({**raw, "mm_projector_type": "linear", "mm_vision_select_feature": "x"})
    with pytest.raises(InputError, match="mm_patch_merge_type = 'spatial_unpad'"):
        original.decoder_settings({**raw, "mm_patch_merge_type": "spatial_unpad"})


def test_files_besides_the_weights_are_carried_verbatim(source: Path, tmp_path: Path):
    (source / "notes.txt").write_text("not part of a model")
    hf.convert(source, tmp_path / "out")
    besides = {entry.name for entry in source.iterdir()} - {"model.safetensors", "notes.txt"}
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == besides | {"params", "lmmjax.json"}
    for name in besides:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str, source: Path, tmp_path: Path):
    assert hf.main([str(source), str(tmp_path / "out"), "--dtype", dtype]) == 0
    about = json.loads((tmp_path / "out" / "lmmjax.json").read_text())
    assert about["dtypes"] == [dtype]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_files(dtype: str, shards: int, source: Path, tmp_path: Path):
    torch = pytest.importorskip("torch", reason=".bin files are torch's")
    (source / "model.safetensors").unlink()
    whole = {name: torch.from_numpy(value).to(getattr(torch, dtype)) for name, value in TENSORS.items()}
    names = [f"pytorch_model-{number}.bin" for number in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    owner = {name: names[number % shards] for number, name in enumerate(whole)}
    for file in names:
        torch.save({name: tensor for name, tensor in whole.items() if owner[name] == file}, source / file)
    if shards > 1:
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": owner}))
    hf.convert(source, tmp_path / "out")
    assert_holds(tmp_path / "out", {name: tensor.float().numpy() for name, tensor in whole.items()})


def test_pickled_code_is_not_run(source: Path, tmp_path: Path, capsys):
    torch = pytest.importorskip("torch", reason=".bin files are torch's")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    (source / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path, capsys, "cannot be read safely")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", ["list", "nested", "number", "int keys"])
def test_a_pytorch_file_of_something_else(content: str, source: Path, tmp_path: Path, capsys):
    torch = pytest.importorskip("torch", reason=".bin files are torch's")
    one = torch.ones(1)
    contents = {"list": [one], "nested": {"model": {"weight": one}}, "number": {"step": 3}, "int keys": {0: one}}
    (source / "model.safetensors").unlink()
    torch.save(contents[content], source / "pytorch_model.bin")
    assert_refused(source, tmp_path, capsys, "expected a model's state_dict")


def test_pytorch_files_without_torch(source: Path, tmp_path: Path, capsys, monkeypatch):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_refused(source, tmp_path, capsys, "needs torch to be read: pip install torch")


def assert_refused(source: Path | str, tmp_path: Path, capsys, message: str, *options: str) -> None:
    """One line on stderr, exit code 2, and nothing left behind."""
    before = sorted(tmp_path.iterdir())
    assert hf.main([str(source), str(tmp_path / "out"), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "convert:" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def _missing_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    write_weights(source, TENSORS, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()


def _truncated(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _twice(source: Path) -> None:
    _missing_shard(source)
    shutil.copy(source / "model-00001-of-00003.safetensors", source / "model-00002-of-00003.safetensors")


def _index(weight_map: object) -> Callable[[Path], None]:
    return lambda source: (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))  # type: ignore


def _edit(**changes: np.ndarray | None) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        tensors = {**TENSORS, **changes}
        write_weights(source, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    return damage


def _config(**changes) -> Callable[[Path], None]:
    return lambda source: (source / "config.json").write_text(json.dumps(hf_config(**changes)))  # type: ignore


def _with(name: str, value: float) -> np.ndarray:
    tensor = TENSORS[name].copy()
    tensor.flat[3] = value
    return tensor


@pytest.mark.parametrize(
    ("damage", "message", "options"),
    [
        (_missing_shard, "missing model-00002-of-00003.safetensors, named in model.safetensors.index.json", ()),
        (_truncated, "model.safetensors is damaged or cut short", ()),
        (_edit(**{NORM: np.ones(31, np.float32)}), f"{NORM} is (31,), expected (32,)", ()),
        (_edit(**{NORM: None}), f"1 missing tensors: {NORM}", ()),
        (_edit(stray=np.ones(1, np.float32)), "1 tensors without a place: stray", ()),
        (_edit(**{EMBEDDING: _with(EMBEDDING, np.nan)}), f"{EMBEDDING} holds NaN or infinite weights", ()),
        (_edit(**{EMBEDDING: _with(EMBEDDING, np.inf)}), f"{EMBEDDING} holds NaN or infinite weights", ()),
        (_edit(**{EMBEDDING: _with(EMBEDDING, 1e5)}), "too large for float16", ("--dtype", "float16")),
        (_config(text={"model_type": "qwen2"}), "text_config.model_type is 'qwen2'", ()),
        (_config(text={"num_hidden_layers": 3}), "9 missing tensors: language_model.model.layers.2.", ()),
        (_twice, "model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors", ()),
        (_index({"weight": 3}), "no weight_map of file names", ()),
        (lambda source: (source / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model", ()),
        (lambda source: (source / "config.json").unlink(), "config.json: cannot be read", ()),
        (lambda source: (source / "config.json").write_text("{"), "config.json: cannot be read", ()),
        (lambda source: (source / "model.safetensors").unlink(), "holds no weights", ()),
        (lambda source: None, "leave it out", ("--vision", ".")),
    ],
)
def test_bad_input(damage, message: str, options: tuple[str, ...], source: Path, tmp_path: Path, capsys):
    damage(source)
    assert_refused(source, tmp_path, capsys, message, *options)


def test_an_existing_target_is_refused_and_kept(source: Path, tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    assert_refused(source, tmp_path, capsys, "exists; expected a name that is free")


def test_a_source_that_is_nowhere(tmp_path: Path, capsys, monkeypatch):
    assert_refused(tmp_path / "absent", tmp_path, capsys, "there is no directory")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_refused("owner/name", tmp_path, capsys, "owner/name is no directory here and cannot be had from the hub")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_is_asked_for_one_format(file: str, source: Path, monkeypatch):
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.bin" in allow_patterns))
        return str(source)

    (source / "model.safetensors").rename(source / file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf.locate("owner/name", "main") == source
    assert asked == [("owner/name", "main", False), ("owner/name", "main", True)][: 1 + file.endswith(".bin")]


def test_an_original_without_its_tower(tmp_path: Path, capsys):
    write_original(tmp_path / "source", tower_inside=False)
    assert_refused(tmp_path / "source", tmp_path, capsys, "download somebody/clip and give --vision DIR")


def test_a_tied_head_must_be_the_embedding(tmp_path: Path, capsys):
    config = hf_config(text={"tie_word_embeddings": True})
    tensors = random_tensors(config)
    write_hf(tmp_path / "same", config, {**tensors, LM_HEAD: tensors[EMBEDDING]})
    assert hf.main([str(tmp_path / "same"), str(tmp_path / "converted")]) == 0
    write_hf(tmp_path / "other", config, {**tensors, LM_HEAD: tensors[EMBEDDING] + 1})
    capsys.readouterr()
    assert_refused(tmp_path / "other", tmp_path, capsys, "differs from the embedding")


def test_a_killed_conversion_is_never_visible_and_does_not_hinder_the_next(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert hf.main([str(source), str(out)]) == 0
    assert_holds(out, TENSORS)
    assert not list(tmp_path.glob(".out.partial-*"))


def test_every_tensor_keeps_its_own_dtype(source: Path, tmp_path: Path):
    mixed = {**TENSORS, NORM: TENSORS[NORM].astype(np.float16)}
    write_weights(source, mixed)
    hf.convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lmmjax.json").read_text())["dtypes"] == ["float16", "float32"]
    assert load_file(source / "model.safetensors")[NORM].dtype == np.float16
    shutil.rmtree(tmp_path / "out")
