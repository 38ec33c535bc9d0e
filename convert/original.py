"""The original LLaVA 1.5's checkpoints: config, tokenizer and tower brought into Hugging Face's form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.material import Material
from convert.names import canonical
from convert.parts import CHAT_TEMPLATE, Decoder, join
from convert.source import Renamed, open_source
from convert.tower import Tower, preprocessor, tower_of, vision_config
from lmmjax.errors import InputError

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


def is_original(raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is the original LLaVA's."""
    return "mm_vision_tower" in raw or "LlavaLlamaForCausalLM" in (raw.get("architectures") or ())


def gather(source: Path, raw: Mapping[str, Any], vision: Path | None, scratch: Path) -> Material:
    """Returns the material of an original checkpoint; what has to be made anew is written into `scratch`.

    The tower's weights come from the checkpoint if it holds them, else from the CLIP directory `vision`.

    Raises:
        InputError: a setting is not handled, or the tower or the tokenizer cannot be had.
    """
    tower, decoder = parts(source, raw, vision)
    return join(tower, decoder, None, scratch, chat_template=chat_template(source))


def parts(source: Path, raw: Mapping[str, Any], vision: Path | None) -> tuple[Tower, Decoder]:
    """Returns the parts of an original checkpoint; arguments and errors are those of `gather`."""
    settings, weights = decoder_settings(raw), open_source(source)
    names = {name: name for name in weights.tensors}
    inside = {name: name for name in names if (canonical(name) or "").startswith("vision_tower.")}
    if inside:
        shape, tower_weights = _vision_config(raw, vision), Renamed(weights, inside)
    elif vision is not None:
        shape, tower_weights = vision_config(vision), tower_of(vision)
    else:
        named = raw.get("mm_vision_tower")
        raise InputError(f"SRC: {source} has no vision tower; download {named} and give --vision DIR")
    tower = Tower(shape, tower_weights, preprocessor(shape, source, vision))
    rest = Renamed(weights, {name: name for name in names if name not in inside})
    return tower, Decoder(weights=rest, directory=source, **settings)


def chat_template(source: Path) -> str | None:
    """Returns the template to be written for an original checkpoint: None if it brings one, which few do."""
    return None if (source / "chat_template.jinja").exists() else CHAT_TEMPLATE


def decoder_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an original config says of the decoder, and of the features that it sees.

    What is not of the projector or tower is the decoder's.

    Raises:
        InputError: something else than LLaVA 1.5 does.
    """
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
        "settings": {**text, "model_type": _FAMILIES[raw["model_type"]]},
        "feature_layer": raw["mm_vision_select_layer"],
        "strategy": strategy,
    }


def _vision_config(raw: Mapping[str, Any], vision: Path | None) -> Mapping[str, Any]:
    if vision is not None:
        return vision_config(vision)
    named = raw.get("mm_vision_tower")
    if named not in _TOWERS:
        raise InputError(f"config.json: mm_vision_tower = {named!r} is unknown; give its directory with --vision DIR")
    return _TOWERS[named]
