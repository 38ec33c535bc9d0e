"""The original LLaVA 1.5's checkpoints: config, tokenizer and tower brought into Hugging Face's form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.names import canonical
from convert.source import Material, Renamed, Shards, Source, open_source
from lmmjax.checkpoint import carried_files, read_json
from lmmjax.config import VisionConfig, from_hf
from lmmjax.errors import InputError

IMAGE_TOKEN = "<image>"

# The tower that LLaVA 1.5 names without containing it; of any other, --vision gives the config.
_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_L, "image_size": 224},
}
_FAMILIES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

# Read below, or settings of the training alone. `image_aspect_ratio` is how the original crops before its
# preprocessor; llava-hf's conversions leave it out too, and so agree with transformers' processor.
_READ = frozenset(
    "model_type mm_projector_type mm_vision_select_layer mm_vision_select_feature mm_vision_tower".split()
)
_TRAINING = frozenset(
    "freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler "
    "unfreeze_mm_vision_tower mm_vision_tower_lr mm_projector_lr use_mm_proj mm_hidden_size mm_use_im_patch_token "
    "image_aspect_ratio image_grid_pinpoints image_crop_resolution image_split_resolution max_length "
    "tokenizer_model_max_length tokenizer_padding_side architectures".split()
)
_REQUIRED = {"mm_use_im_start_end": (False, None), "mm_resampler_type": (None,), "mm_patch_merge_type": ("flat", None)}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}

# The conversation of LLaVA 1.5 ("vicuna_v1"), which the original keeps in its code.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def is_original(raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is the original LLaVA's."""
    return "mm_vision_tower" in raw or "LlavaLlamaForCausalLM" in (raw.get("architectures") or ())


def gather(source: Path, raw: Mapping[str, Any], vision: Path | None, scratch: Path) -> Material:
    """Returns the material of an original checkpoint; what has to be made anew is written into `scratch`.

    The tower's weights come from the checkpoint if it holds them, else from the CLIP directory `vision`.

    Raises:
        InputError: a setting is not handled, or the tower or the tokenizer cannot be had.
    """
    weights = open_source(source)
    if not any(_is_tower(name) for name in weights.tensors):
        if vision is None:
            named = raw.get("mm_vision_tower")
            raise InputError(f"SRC: {source} has no vision tower; download {named} and give --vision DIR")
        weights = Shards([weights, _tower_of(vision)])
    image_token = _write_tokenizer(source, scratch)
    settings = translate(raw, _vision_config(raw, vision), image_token)
    _write_processor(source, vision, from_hf(settings).vision, scratch)
    made = carried_files(scratch)
    kept = [file for file in carried_files(source) if file.name not in {new.name for new in made}]
    return Material(json.dumps(settings, indent=2).encode(), kept + made, weights)


def translate(raw: Mapping[str, Any], vision: Mapping[str, Any], image_token: int) -> dict[str, Any]:
    """Returns Hugging Face's config of an original one; what is not of the projector or tower is the decoder's."""
    strategy = _STRATEGIES.get(raw.get("mm_vision_select_feature", "patch"))
    problems = [
        f"{name} = {raw[name]!r}" for name, allowed in _REQUIRED.items() if name in raw and raw[name] not in allowed
    ]
    checks = {
        "model_type": raw.get("model_type") in _FAMILIES,
        "mm_projector_type": raw.get("mm_projector_type") == "mlp2x_gelu",
        "mm_vision_select_layer": isinstance(raw.get("mm_vision_select_layer"), int),
        "mm_vision_select_feature": strategy is not None,
    }
    problems += [f"{name} = {raw.get(name)!r}" for name, good in checks.items() if not good]
    if problems:
        raise InputError(f"config.json: {', '.join(problems)} is not handled; expected an original LLaVA 1.5")
    text = {name: value for name, value in raw.items() if name not in _READ | _TRAINING | set(_REQUIRED)}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": raw["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "vision_config": dict(vision),
        "text_config": {**text, "model_type": _FAMILIES[raw["model_type"]]},
    }


def _is_tower(name: str) -> bool:
    return (canonical(name) or "").startswith("vision_tower.")


def _tower_of(vision: Path) -> Source:
    """Returns a CLIP directory's tower under LLaVA's names; its text half stays behind."""
    source = open_source(vision)
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return Renamed(source, {f"vision_tower.{name}": name for name in source.tensors if not name.startswith(other)})


def _vision_config(raw: Mapping[str, Any], vision: Path | None) -> Mapping[str, Any]:
    if vision is None:
        named = raw.get("mm_vision_tower")
        if named not in _TOWERS:
            raise InputError(
                f"config.json: mm_vision_tower = {named!r} is unknown; give its directory with --vision DIR"
            )
        return _TOWERS[named]
    clip = read_json(vision / "config.json")
    part = clip.get("vision_config", clip)
    return {**part, "model_type": "clip_vision_model"} if clip.get("model_type") == "clip" else part


def _write_tokenizer(source: Path, scratch: Path) -> int:
    """Returns the image token's id, after writing a tokenizer.json that knows it if there is none."""
    from tokenizers import AddedToken

    tokenizer = _tokenizer(source)
    if (source / "tokenizer.json").exists() and tokenizer.token_to_id(IMAGE_TOKEN) is not None:
        return tokenizer.token_to_id(IMAGE_TOKEN)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(scratch / "tokenizer.json"))
    return tokenizer.token_to_id(IMAGE_TOKEN)


def _tokenizer(source: Path) -> Any:
    from tokenizers import Tokenizer

    if (source / "tokenizer.json").exists():
        return Tokenizer.from_file(str(source / "tokenizer.json"))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True).backend_tokenizer
    except Exception as error:  # from a missing library to a file that is no tokenizer
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: cannot read its tokenizer ({reason}); pip install sentencepiece, or add tokenizer.json"
        ) from error


def _write_processor(source: Path, vision: Path | None, tower: VisionConfig, scratch: Path) -> None:
    """Writes what the original keeps in code or beside the tower: chat template and image preprocessor."""
    if not (source / "chat_template.jinja").exists():
        (scratch / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    name = "preprocessor_config.json"
    given = [directory / name for directory in (source, vision) if directory and (directory / name).exists()]
    text = given[0].read_text() if given else json.dumps(_preprocessor(tower.image_size), indent=2)
    (scratch / name).write_text(text)
    expansion = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": "full" if tower.keep_class_token else "default",
    }
    (scratch / "processor_config.json").write_text(json.dumps(expansion, indent=2))


def _preprocessor(size: int) -> dict[str, Any]:
    """Returns the preprocessing that OpenAI's CLIP was trained with."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "crop_size": {"height": size, "width": size},
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
