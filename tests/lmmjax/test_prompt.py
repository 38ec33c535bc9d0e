"""Prompts and pixels equal transformers' own processor; every misuse is one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_checkpoints import VOCABULARY, write_processor

from lmmjax.config import LlavaConfig, TextConfig, VisionConfig
from lmmjax.errors import InputError
from lmmjax.prompt import Processor, bucket, pad

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %} ASSISTANT:"
)
PLAIN_TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
PREPROCESSOR = {**tiny_checkpoints.PREPROCESSOR, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def config(**changes) -> LlavaConfig:
    vision = VisionConfig(width=16, ffn=32, layers=2, heads=2, image_size=28, patch_size=14, feature_layers=(1,))
    text = TextConfig(vocab=300, width=16, ffn=32, layers=1, heads=2, kv_heads=2, head_dim=8, context=64)
    return LlavaConfig(**{"vision": vision, "text": text, "image_token": 3, **changes})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_processor(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return tmp_path


@pytest.fixture
def processor(directory: Path) -> Processor:
    return Processor.load(directory, config())


def picture(width: int = 40, height: int = 31) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hf_processor(directory: Path):
    pytest.importorskip("torch", reason="transformers' LlavaProcessor wants torch")
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_ids_equal_transformers_processor(processor: Processor, directory: Path, images: int, system: str | None):
    parts = [*[{"type": "image", "image": picture()}] * images, {"type": "text", "text": "what is it?"}]
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns.append({"role": "user", "content": parts})
    expected = hf_processor(directory).apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert processor.encode(processor.render("what is it?", images, system), images) == expected


@pytest.mark.parametrize("text", ["<s>USER: <image> hi", "USER: <image> hi", "a<image>b"])
def test_the_start_token_comes_once(processor: Processor, directory: Path, text: str):
    ids = processor.encode(text, 1)
    assert ids.count(1) == 1
    assert ids.count(3) == 4
    expected = hf_processor(directory)(text=text, images=[picture()], add_special_tokens=not text.startswith("<s>"))[
        "input_ids"
    ][0]
    assert ids == expected


def test_pixels_are_resized_cropped_and_normalized(processor: Processor, tmp_path: Path):
    picture(40, 31).save(tmp_path / "a.png")
    got = processor.pixels([tmp_path / "a.png", picture(31, 40)])
    assert got.shape == (2, 3, 28, 28)
    resized = np.asarray(picture(40, 31).resize((36, 28), Image.Resampling.BICUBIC), np.float32)
    cropped = resized[:, 4:32].transpose(2, 0, 1) / 255
    mean, std = (np.array(PREPROCESSOR[name], np.float32)[:, None, None] for name in ("image_mean", "image_std"))
    np.testing.assert_allclose(got[0], (cropped - mean) / std, atol=1e-5)


def test_pixels_equal_transformers(processor: Processor, directory: Path):
    expected = hf_processor(directory).image_processor([picture(), picture(29, 90)])["pixel_values"]
    np.testing.assert_allclose(processor.pixels([picture(), picture(29, 90)]), np.stack(expected), atol=1e-5)


def test_a_picture_is_turned_as_its_camera_says(processor: Processor, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise to show
    picture().save(tmp_path / "turned.png", exif=exif)
    expected = processor.pixels([picture().transpose(Image.Transpose.ROTATE_270)])
    np.testing.assert_array_equal(processor.pixels([tmp_path / "turned.png"]), expected)


def test_the_preprocessor_is_found_where_transformers_5_writes_it(directory: Path):
    expected = Processor.load(directory, config()).pixels([picture()])
    (directory / "preprocessor_config.json").rename(directory / "old")
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    np.testing.assert_array_equal(Processor.load(directory, config()).pixels([picture()]), expected)


def test_no_template_puts_one_line_before_the_text_for_each_image(directory: Path):
    (directory / "chat_template.jinja").unlink()
    processor = Processor.load(directory, config())
    assert processor.render("what?", 2) == "<image>\n<image>\nwhat?"
    assert processor.render("this <image>?", 1) == "this <image>?"
    with pytest.raises(InputError, match="no chat template"):
        processor.render("what?", 1, "Be brief.")


def test_a_template_of_a_text_model_gets_plain_text(directory: Path):
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN_TEMPLATE}))
    processor = Processor.load(directory, config())
    assert processor.render("what?", 1) == "[<image>\nwhat?]"
    assert processor.render("what?", 1, "Brief.") == "[Brief.][<image>\nwhat?]"


def test_placeholders_in_the_question_stay_where_they_are(processor: Processor):
    assert processor.render("is <image> like <image>?", 2) == "USER: is <image> like <image>? ASSISTANT:"


def test_a_system_text_is_never_dropped_silently(directory: Path):
    (directory / "chat_template.jinja").write_text("{{ messages[-1]['content'][0]['text'] }}{# image #}")
    with pytest.raises(InputError, match="no place for a system text"):
        Processor.load(directory, config()).render("what?", 0, "Be brief.")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="no system role"):
        Processor.load(directory, config()).render("what?", 0, "Be brief.")


def test_answers_are_decoded_without_special_tokens(processor: Processor):
    ids = processor.tokenizer.encode("yes, a héron", add_special_tokens=False)
    assert processor.decode([1, *ids, 2]) == "yes, a héron"
    assert processor.eos == (2,)


def test_the_generation_config_adds_ends(directory: Path):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Processor.load(directory, config()).eos == (2, 7)


def test_an_original_llava_tokenizer_learns_the_image_token(directory: Path):
    stored = json.loads((directory / "tokenizer.json").read_text())
    renamed = json.dumps(stored).replace("<image>", "<other>")
    (directory / "tokenizer.json").write_text(renamed)
    processor = Processor.load(directory, config(image_token=VOCABULARY))
    assert processor.encode("a<image>", 1)[-4:] == [VOCABULARY] * 4


@pytest.mark.parametrize(
    ("text", "images", "says"),
    [
        ("hello", 1, "no image token"),
        ("<image> hello", 2, "1 <image> for 2"),
        ("<image> hello", 0, "1 <image> for 0"),
        ("x" * 64, 0, "65 tokens do not fit the model's context of 64"),
    ],
)
def test_prompts_that_cannot_be_run(processor: Processor, text: str, images: int, says: str):
    with pytest.raises(InputError, match=says):
        processor.encode(text, images)


def test_images_that_cannot_be_read(processor: Processor, tmp_path: Path):
    broken = tmp_path / "broken.png"
    picture().save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    (tmp_path / "text.png").write_text("not a picture")
    for path in (tmp_path / "missing.png", tmp_path / "text.png", broken, tmp_path):
        with pytest.raises(InputError, match=str(path)):
            processor.pixels([path])


def test_checkpoints_that_do_not_fit_themselves(directory: Path):
    with pytest.raises(InputError, match=r"id 3, config.json's image token is 5"):
        Processor.load(directory, config(image_token=5))
    (directory / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "crop_size": 14}))
    with pytest.raises(InputError, match=r"makes \(3, 14, 14\)"):
        Processor.load(directory, config()).pixels([picture()])
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(InputError, match="image_processor_type is ViTImageProcessor"):
        Processor.load(directory, config()).pixels([picture()])
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config.json"):
        Processor.load(directory, config()).pixels([picture()])
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        Processor.load(directory, config())
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer.json"):
        Processor.load(directory, config())


@given(st.integers(1, 1 << 20))
def test_buckets_are_few_and_fit(n: int):
    size = bucket(n)
    assert n <= size
    assert size - n < max(16, size / 5)
    assert bucket(size) == size


def test_an_octave_has_four_buckets():
    assert sorted({bucket(n) for n in range(513, 1025)}) == [640, 768, 896, 1024]


def test_pad_is_on_the_right():
    tokens, lengths = pad([[5, 6, 7], [8]], pad_id=9)
    assert tokens.shape == (2, 16)
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens[0].tolist() == [5, 6, 7] + [9] * 13
    assert tokens[1].tolist() == [8] + [9] * 15
    assert lengths.tolist() == [3, 1]
    assert pad([[1]], to=4)[0].shape == (1, 4)
