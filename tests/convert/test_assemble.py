"""`python -m convert.assemble`: every kind of part, the numbers that come out, and each kind of bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_parts
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CHAT_TEMPLATE, IMAGE_TOKEN, hf_config, write_original

from convert import assemble, hf, tokens, tower
from convert.gguf import Gguf
from convert.gguf_tokenizer import write_tokenizer
from convert.names import slots
from convert.parts import CHAT_TEMPLATE as LLAVA_TEMPLATE
from lmmjax import llava
from lmmjax.checkpoint import load
from lmmjax.config import from_hf
from lmmjax.files import read_json
from lmmjax.prompt import Processor

TENSORS = tiny_parts.tensors()
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
Q = "language_model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """A vision, a text and a projector of this test's own, to be damaged."""
    folder = tmp_path / "parts"
    folder.mkdir()
    return {
        "vision": tiny_parts.write_clip(folder / "clip", TENSORS),
        "text": tiny_parts.write_llama(folder / "llama", TENSORS),
        "projector": tiny_parts.write_projector(folder / "projector.safetensors", TENSORS),
    }


def holds(path: Path, tensors: dict[str, np.ndarray], **options) -> None:
    loaded = load(path, **options)
    leaves = flatten_dict(loaded.params, sep=".")
    expected = {slot.leaf: slot.to_ours(tensors[slot.name]) for slot in slots(loaded.config)}
    assert set(leaves) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(leaves[name], array, err_msg=name)


def test_parts_become_the_whole(parts, tmp_path: Path):
    arguments = [str(part) for name in parts for part in (f"--{name}", parts[name])]
    assert assemble.main([*arguments, str(tmp_path / "out"), "--hf", str(tmp_path / "hf")]) == 0
    holds(tmp_path / "out", TENSORS)
    config = load(tmp_path / "out").config
    assert (config.image_token, config.vision.feature_layers) == (IMAGE_TOKEN, (2,))
    hf.convert(tmp_path / "hf", tmp_path / "back")
    holds(tmp_path / "back", TENSORS)
    ours, theirs = ({file.name for file in (tmp_path / name).iterdir()} for name in ("out", "hf"))
    assert ours - theirs == {"params", "lmmjax.json"}
    assert theirs - ours == {"model.safetensors"}
    for name in ours & theirs:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_hugging_face_only_and_another_dtype(parts, tmp_path: Path):
    assemble.assemble(**parts, hf=tmp_path / "hf", dtype="bfloat16")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {"bfloat16"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"parts", "hf"}


def test_the_processor_of_the_whole(parts, tmp_path: Path):
    assemble.assemble(**parts, target=tmp_path / "out")
    processor = Processor.load(tmp_path / "out", load(tmp_path / "out").config)
    assert processor.render("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert processor.encode("<image> a", 1).count(IMAGE_TOKEN) == 4
    assert processor.eos == (2,)
    assert processor.pixels([Image.new("RGB", (40, 30))]).shape == (1, 3, 28, 28)


def test_chat_templates(parts, tmp_path: Path):
    (tmp_path / "template").write_text("{{ messages[0]['content'][0]['text'] }} <image>!")
    assemble.assemble(**parts, target=tmp_path / "given", chat_template=tmp_path / "template")
    assemble.assemble(**parts, target=tmp_path / "own", own_chat_template=True)
    assemble.assemble(**parts, target=tmp_path / "default")
    templates = {name: (tmp_path / name / "chat_template.jinja").read_text() for name in ("given", "own", "default")}
    given = (tmp_path / "template").read_text()
    assert templates == {"given": given, "own": CHAT_TEMPLATE, "default": LLAVA_TEMPLATE}


def test_a_template_is_used_wherever_the_text_part_had_its_own(parts, tmp_path: Path):
    (parts["text"] / "chat_template.jinja").unlink()
    settings = read_json(parts["text"] / "tokenizer_config.json")
    (parts["text"] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "other"}))
    (parts["text"] / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    assemble.assemble(**parts, target=tmp_path / "out")
    processor = Processor.load(tmp_path / "out", load(tmp_path / "out").config)
    assert processor.render("What?", 0) == "USER: What? ASSISTANT:"


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (2, 3), (14, 7), (3, 3), (1, 2)])
def test_resampling_is_torchs(old: int, new: int):
    torch = pytest.importorskip("torch", reason="what is compared with")
    grid = np.random.default_rng(0).standard_normal((old, old, 5)).astype(np.float32)
    image = torch.from_numpy(grid).permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(tower.resample(grid, new), want[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_another_image_size(parts, tmp_path: Path):
    assemble.assemble(**parts, target=tmp_path / "out", image_size=42)
    old = TENSORS[POSITIONS]
    patches = tower.resample(old[1:].reshape(2, 2, -1), 3).reshape(9, -1)
    holds(tmp_path / "out", {**TENSORS, POSITIONS: np.concatenate([old[:1], patches])})
    config = load(tmp_path / "out").config
    processor = Processor.load(tmp_path / "out", config)
    assert config.vision.image_tokens == processor.encode("<image>", 1).count(IMAGE_TOKEN) == 9
    assert processor.pixels([Image.new("RGB", (40, 30))]).shape == (1, 3, 42, 42)


def test_images_that_were_squeezed_stay_squeezed(parts, tmp_path: Path):
    file = parts["vision"] / "preprocessor_config.json"
    changes = {"size": {"height": 28, "width": 28}, "do_center_crop": False}
    file.write_text(json.dumps({**read_json(file), **changes}))
    assemble.assemble(**parts, target=tmp_path / "out", image_size=42)
    processor = Processor.load(tmp_path / "out", load(tmp_path / "out").config)
    assert processor.pixels([Image.new("RGB", (40, 30))]).shape == (1, 3, 42, 42)


def test_what_transformers_makes_of_another_image_size(parts, tmp_path: Path):
    """The resampled tower sees 42 pixels as transformers' own sees them by `interpolate_pos_encoding`."""
    torch = pytest.importorskip("torch", reason="what is compared with")
    import transformers

    assemble.assemble(**parts, hf=tmp_path / "hf", image_size=42)
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 42, 42)).astype(np.float32))
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    clip = transformers.CLIPVisionModel.from_pretrained(parts["vision"], dtype=torch.float32)
    with torch.no_grad():
        got = whole.model.vision_tower(pixels).last_hidden_state
        want = clip(pixels, interpolate_pos_encoding=True).last_hidden_state
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)


def test_an_unused_special_token_becomes_the_image_token(parts, tmp_path: Path):
    file = tiny_parts.write_gguf(tmp_path / "a.gguf")
    clip = parts["vision"]
    assemble.assemble(clip, file, tmp_path / "taken", hf=tmp_path / "hf", image_token_id=3, random_projector=0)
    assemble.assemble(clip, file, tmp_path / "behind", hf=tmp_path / "grown", random_projector=0)
    for name, token in (("taken", 3), ("behind", 319)):
        config = load(tmp_path / name).config
        processor = Processor.load(tmp_path / name, config)
        assert config.image_token == token
        assert processor.encode("<image>a", 1)[:5] == [token] * 4 + processor.encode("a", 0)
        assert processor.decode(processor.encode("<image> Paris", 1)) == " Paris"
    assert "<unused>" not in (tmp_path / "taken" / "tokenizer.json").read_text()
    rows = {name: read_json(tmp_path / name / "config.json")["text_config"]["vocab_size"] for name in ("hf", "grown")}
    assert rows == {"hf": 319, "grown": 320}


def test_the_text_of_a_gguf_file(parts, tmp_path: Path):
    file = tiny_parts.write_gguf(tmp_path / "a.gguf", tied=True)
    assemble.assemble(parts["vision"], file, tmp_path / "out", random_projector=0, image_token_id=3)
    processor = Processor.load(tmp_path / "out", load(tmp_path / "out").config)
    assert processor.eos == (2,)
    assert processor.template == LLAVA_TEMPLATE
    assemble.assemble(parts["vision"], file, tmp_path / "own", random_projector=0, own_chat_template=True)
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == tiny_parts.TURNS


def test_a_random_projector_is_its_seeds(parts, tmp_path: Path):
    del parts["projector"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assemble.assemble(**parts, target=tmp_path / name, random_projector=seed)
    a, b, c = (np.asarray(load(tmp_path / name).params["projector"]["linear_1"]["kernel"]) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert abs(a - c).max() > 0.1
    assert np.std(a) == pytest.approx(32**-0.5, rel=0.1)


def test_a_projector_without_biases(parts, tmp_path: Path):
    kept = {slot.name: TENSORS[slot.name] for slot in slots(from_hf(hf_config(multimodal_projector_bias=False)))}
    tiny_parts.write_projector(parts["projector"], kept)
    assemble.assemble(**parts, target=tmp_path / "out")
    assert not load(tmp_path / "out").config.projector_bias
    holds(tmp_path / "out", kept)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector."])
def test_the_originals_projector_files(prefix: str, parts, tmp_path: Path):
    """mm_projector.bin, and the non_lora_trainables.bin of a LoRA release."""
    torch = pytest.importorskip("torch", reason=".bin files are torch's")
    names = {"multi_modal_projector.linear_1.": f"{prefix}0.", "multi_modal_projector.linear_2.": f"{prefix}2."}
    projector = {name: value for name, value in TENSORS.items() if name.startswith("multi")}
    for old, new in names.items():
        projector = {name.replace(old, new): value for name, value in projector.items()}
    parts["projector"] = tmp_path / "mm_projector.bin"
    torch.save({name: torch.from_numpy(value) for name, value in projector.items()}, parts["projector"])
    assemble.assemble(**parts, target=tmp_path / "out")
    holds(tmp_path / "out", TENSORS)


@pytest.mark.parametrize("name", [Q, Q.removeprefix("language_model.")])
def test_an_adapter_is_merged(name: str, parts, tmp_path: Path):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 32)).astype(np.float32), rng.standard_normal((32, 4)).astype(np.float32)
    lora = tiny_parts.write_adapter(tmp_path / "lora", {name: (a, b)})
    assemble.assemble(**parts, target=tmp_path / "out", lora=lora)
    holds(tmp_path / "out", {**TENSORS, f"{Q}.weight": TENSORS[f"{Q}.weight"] + np.float32(2) * (b @ a)})


@pytest.mark.parametrize("inside", [True, False])
def test_an_original_release(inside: bool, tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=inside)
    assemble.assemble(clip, tmp_path / "source", tmp_path / "out")
    hf.convert(tmp_path / "source", tmp_path / "same", vision=clip)
    holds(tmp_path / "out", TENSORS)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "same" / "config.json").read_bytes()


def test_an_originals_settings_are_kept_unless_others_are_given(tmp_path: Path):
    clip = write_original(tmp_path / "source", tower_inside=False, mm_vision_select_layer=-1)
    assemble.assemble(clip, tmp_path / "source", tmp_path / "kept")
    assemble.assemble(clip, tmp_path / "source", tmp_path / "given", feature_layer=-3, image_size=42)
    assert load(tmp_path / "kept").config.vision.feature_layers == (3,)
    vision = load(tmp_path / "given").config.vision
    assert (vision.feature_layers, vision.image_size) == ((1,), 42)


def refused(arguments: list[str], tmp_path: Path, capsys, message: str) -> None:
    """One line on stderr, exit code 2, and nothing left behind."""
    before = sorted(tmp_path.rglob("*"))
    assert assemble.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "convert:" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def _edited(name: str, **changes) -> Callable[[dict[str, Path]], None]:
    def damage(parts: dict[str, Path]) -> None:
        file = parts[name] / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def _without(part: str, file: str) -> Callable[[dict[str, Path]], None]:
    return lambda parts: (parts[part] / file).unlink()


def _projector(**changes: np.ndarray) -> Callable[[dict[str, Path]], None]:
    return lambda parts: save_file({**load_file(parts["projector"]), **changes}, parts["projector"])


def _fine(parts: dict[str, Path]) -> None:
    """Nothing is damaged: the options are wrong."""


LINEAR = "multi_modal_projector.linear_1.weight"


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_fine, ["--vision", "absent"], "--vision: there is no directory absent"),
        (_fine, ["--text", "absent"], "--text: there is no absent; expected a directory or a .gguf file"),
        (_fine, ["--text", __file__], "cannot be read as GGUF"),
        (_fine, ["--projector", "absent.bin"], "there is no file absent.bin"),
        (_fine, ["--projector", __file__], "expected a file of tensors, .safetensors or .bin"),
        (_fine, ["--random-projector", "0"], "a file beside --random-projector; expected one of the two"),
        (_fine, ["--lora", "absent"], "there is no file absent"),
        (_fine, ["--image-size", "30"], "--image-size: got 30, expected a multiple of the tower's patch size 14"),
        (_fine, ["--image-size", "-14"], "--image-size: got -14"),
        (_fine, ["--image-token-id", "9"], "--image-token-id: 9 is"),
        (_fine, ["--image-token-id", "999"], "--image-token-id: 999 is no token"),
        (_fine, ["--image-token-id", "-1"], "--image-token-id: -1 is no token"),
        (_fine, ["--image-token-id", "0"], "<image> is token 3 already; leave it out"),
        (_fine, ["--chat-template", "absent"], "--chat-template: absent cannot be read as text"),
        (_fine, ["--own-chat-template", "--chat-template", __file__], "expected one of the two"),
        (_fine, ["--feature-layer", "9"], "vision_feature_layer = [9]; the tower has 3 layers"),
        (_without("text", "chat_template.jinja"), ["--own-chat-template"], "the text part has none"),
        (_without("text", "tokenizer.json"), [], "cannot read its tokenizer"),
        (_without("text", "config.json"), [], "config.json: cannot be read"),
        (_without("text", "model.safetensors"), [], "holds no weights"),
        (_without("vision", "model.safetensors"), [], "holds no weights"),
        (_edited("text", model_type="qwen2"), [], "is a 'qwen2'; expected a llama"),
        (_edited("text", rope_scaling={"rope_type": "linear", "factor": 2.0}), [], "rope_parameters"),
        (_edited("text", num_hidden_layers=3), [], "9 missing tensors"),
        (_edited("vision", model_type="siglip_vision_model"), [], "vision_config.model_type is 'siglip_vision_model'"),
        (_edited("vision", image_size=42), [], "position_embedding.weight is (5, 32), expected (10, 32)"),
        (_edited("vision", image_size=42), ["--image-size", "28"], "position_embedding.weight has 5 rows, expected 10"),
        (_projector(stray=np.ones(2, np.float32)), [], "1 tensors without a place: stray"),
        (_projector(**{LINEAR: np.ones((32, 31), np.float32)}), [], f"{LINEAR} is (32, 31), expected (32, 32)"),
        (_projector(**{LINEAR: np.full((32, 32), np.nan, np.float32)}), [], f"{LINEAR} holds NaN"),
        (_projector(**{"model.embed_tokens.weight": np.ones((2, 2), np.float32)}), [], "both in the text part and in"),
    ],
)
def test_bad_input(damage, options: list[str], message: str, parts, tmp_path: Path, capsys):
    damage(parts)
    arguments = [str(part) for name in parts for part in (f"--{name}", parts[name])]
    refused([*arguments, *options, str(tmp_path / "out")], tmp_path, capsys, message)


@pytest.mark.parametrize("place", ["projector.safetensors/hf", "out/hf", "."])
def test_one_checkpoint_does_not_stay_without_the_other(place: str, parts, tmp_path: Path, capsys):
    """A file is no directory, which shows when the first is written; the other two are told before."""
    hf = (parts["projector"].parent if "projector" in place else tmp_path) / place
    arguments = [str(part) for name in parts for part in (f"--{name}", parts[name])]
    refused([*arguments, str(tmp_path / "out"), "--hf", str(hf)], tmp_path, capsys, str(hf))


def test_what_is_missing_or_too_much(parts, tmp_path: Path, capsys):
    basic = ["--vision", str(parts["vision"]), "--text", str(parts["text"])]
    refused([*basic, str(tmp_path / "out")], tmp_path, capsys, "--random-projector SEED for one that is to be trained")
    refused([*basic, "--random-projector", "0"], tmp_path, capsys, "OUT: got none")
    refused(
        [*basic, "--random-projector", "-1", str(tmp_path / "out")], tmp_path, capsys, "expected a seed of 0 or more"
    )
    refused([*basic, "--random-projector", "0", str(parts["text"])], tmp_path, capsys, "exists; expected a name that")
    clip = write_original(tmp_path / "source", tower_inside=False)
    original = ["--vision", str(clip), "--text", str(tmp_path / "source"), "--random-projector", "0"]
    refused([*original, str(tmp_path / "out")], tmp_path, capsys, "the text part holds its projector; leave this out")


def test_a_token_in_use_is_no_image_token(parts, tmp_path: Path, capsys):
    file = tiny_parts.write_gguf(tmp_path / "a.gguf")
    arguments = [
        "--vision",
        str(parts["vision"]),
        "--text",
        str(file),
        "--random-projector",
        "0",
        str(tmp_path / "out"),
    ]
    message = "2 is '<|stop|>', used as eos_token, pad_token; expected an unused special token"
    refused([*arguments, "--image-token-id", "2"], tmp_path, capsys, message)
    refused(
        [*arguments, "--image-token-id", "9"], tmp_path, capsys, "which is text; expected the id of an unused special"
    )


def test_logits_are_transformers(parts, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="what is compared with")
    import jax
    import jax.numpy as jnp
    import transformers

    file = tiny_parts.write_gguf(tmp_path / "a.gguf", tied=True)
    out, theirs = tmp_path / "out", tmp_path / "hf"
    assemble.assemble(parts["vision"], file, out, hf=theirs, image_token_id=3, random_projector=0, image_size=42)
    loaded = load(out)
    ids = np.array([[1, *[3] * 9, 20, 30, 40, 50]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 42, 42)).astype(np.float32)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(theirs, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels)).logits.numpy()

    @jax.jit
    def ours(params):
        x = llava.embed_prompts(loaded.config, params, jnp.asarray(ids), jnp.array([14]), jnp.asarray(pixels))
        causal = jnp.tril(jnp.ones((1, 14, 14), bool))
        return llava.logits(
            loaded.config, params, llava.forward(loaded.config, params, x, jnp.arange(14)[None], causal)
        )

    assert np.ptp(want) > 0.5, "logits this flat would hide a difference"
    np.testing.assert_allclose(ours(loaded.params), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [None, 3])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_every_list_of_tokens_learns_of_the_image_token(number: int | None, kind: str, tmp_path: Path):
    """As the hub's checkpoints have them: a class of its own rebuilds the tokenizer from these lists."""
    from transformers import AutoTokenizer

    write_tokenizer(Gguf(tiny_parts.write_gguf(tmp_path / "a.gguf")).metadata, tmp_path)
    added = {str(i): {"content": token, "special": True} for i, token in enumerate(tiny_parts.CONTROL)}
    changes = {"tokenizer_class": kind, "added_tokens_decoder": added, "unk_token": "<|end|>"}
    settings = {**read_json(tmp_path / "tokenizer_config.json"), **changes}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<unused>"]}))
    got = tokens.write_tokenizer(tmp_path, tmp_path, number)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert got == (319 if number is None else number)
    assert tokenizer.encode("<image>a")[:1] == [got]
    assert len(tokenizer) == (320 if number is None else 319)
