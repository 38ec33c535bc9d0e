"""A LLaVA's parts, the tower and the decoder with its projector, joined into one material."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.material import Material
from convert.names import canonical
from convert.source import Source, joined
from convert.tokens import IMAGE_TOKEN, write_tokenizer
from convert.tower import PREPROCESSOR, Tower
from lmmjax.checkpoint import carried_files
from lmmjax.config import from_hf

# The conversation of LLaVA 1.5 ("vicuna_v1"), which the original keeps in its code.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The language model: its `text_config`, its weights (here or elsewhere: the projector's), its tokenizer's files.

    `feature_layer` and `strategy` say which of the tower's features it sees, in Hugging Face's terms.
    """

    settings: Mapping[str, Any]
    weights: Source
    directory: Path
    feature_layer: int = -2
    strategy: str = "default"


def join(
    tower: Tower,
    decoder: Decoder,
    projector: Source | None,
    scratch: Path,
    *,
    image_token: int | None = None,
    chat_template: str | None = None,
) -> Material:
    """Returns the material of a LLaVA of these parts; what has to be made anew is written into `scratch`.

    `projector` None means that the decoder's weights hold it. `image_token` is the id of a special token to
    become `<image>`; by default that token is the tokenizer's, or comes behind its vocabulary. `chat_template`
    takes the place of what the decoder's directory has.

    Raises:
        InputError: the config is not handled, the tokenizer cannot be used, or a tensor is there twice.
    """
    sources = {"the tower": tower.weights, "the text part": decoder.weights}
    weights = joined(sources if projector is None else {**sources, "the projector": projector})
    number = write_tokenizer(decoder.directory, scratch, image_token)
    settings = config(tower.settings, decoder, number, bias=_has_bias(weights))
    _write_processor(settings, tower, scratch, chat_template)
    made = carried_files(scratch)
    replaced = {file.name for file in made} | ({"chat_template.json"} if chat_template else set())
    kept = [file for file in carried_files(decoder.directory) if file.name not in replaced]
    return Material(json.dumps(settings, indent=2).encode(), kept + made, weights)


def config(tower: Mapping[str, Any], decoder: Decoder, image_token: int, bias: bool = True) -> dict[str, Any]:
    """Returns Hugging Face's config of a LLaVA of these parts; `bias` is the projector's."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": decoder.feature_layer,
        "vision_feature_select_strategy": decoder.strategy,
        **({} if bias else {"multimodal_projector_bias": False}),
        "tie_word_embeddings": bool(decoder.settings.get("tie_word_embeddings", False)),
        "vision_config": _without_dtype(tower),
        "text_config": _without_dtype(decoder.settings),
    }


def _without_dtype(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts' dtypes say nothing about the whole's, and transformers would load by them."""
    return {name: value for name, value in settings.items() if name not in ("dtype", "torch_dtype")}


def _has_bias(weights: Source) -> bool:
    """Returns whether the projector has biases, or is not there at all (which is told later, by its names)."""
    names = {canonical(name) for name in weights.tensors}
    part = "multi_modal_projector.linear_1"
    return f"{part}.bias" in names or f"{part}.weight" not in names


def _write_processor(settings: Mapping[str, Any], tower: Tower, scratch: Path, chat_template: str | None) -> None:
    """Writes what belongs to the whole and to no part: chat template, image preprocessing, how images expand."""
    if chat_template is not None:
        (scratch / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    (scratch / PREPROCESSOR).write_text(json.dumps(tower.preprocessor, indent=2))
    vision = from_hf(settings).tower
    expansion = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "full" if vision.keep_class_token else "default",
    }
    (scratch / "processor_config.json").write_text(json.dumps(expansion, indent=2))
