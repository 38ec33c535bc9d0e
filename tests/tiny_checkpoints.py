"""Random tiny LLaVA checkpoints in every layout that is out there, written without torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from convert.names import slots
from lmmjax.config import from_hf

IMAGE_TOKEN = 3
SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
VOCABULARY = len(SPECIAL) + 256
"""Four special tokens and every byte."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "ASSISTANT:"
)
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY + 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def hf_config(vision: Mapping = {}, text: Mapping = {}, **top: Any) -> dict[str, Any]:
    """Returns a config.json: 4 tokens an image, 2 decoder layers with 4 query and 2 kv heads, and these changes."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN,
        "vision_config": {**VISION, **vision},
        "text_config": {**TEXT, **text},
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        **top,
    }


def random_tensors(config: Mapping[str, Any], seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns random weights under their llava-hf names, scaled so that every part shows in the logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for slot in slots(from_hf(config)):
        values = rng.standard_normal(slot.shape)
        if len(slot.shape) > 1:
            values *= np.prod(slot.shape[1:]) ** -0.5
        elif slot.leaf.endswith("scale"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        tensors[slot.name] = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return tensors


def write_hf(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    layout: str = "hub",
    shards: int = 1,
) -> None:
    """Writes a whole checkpoint directory; `layout` is a key of LAYOUTS."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory, {LAYOUTS[layout](name): tensor for name, tensor in tensors.items()}, shards)
    write_processor(directory)


def write_weights(directory: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """Writes model.safetensors, or shards and their index."""
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_processor(directory: Path) -> None:
    """Writes a byte-level tokenizer that begins every text with <s>, a chat template and an image preprocessor."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))


def _in_memory(name: str) -> str:
    name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "model.language_model.")
    for part in ("vision_tower.", "multi_modal_projector."):
        name = name.replace(part, f"model.{part}")
    return name.replace("vision_model.", "")


def _original(name: str) -> str:
    name = name.replace("language_model.", "").replace("vision_tower.", "model.vision_tower.vision_tower.")
    name = name.replace("multi_modal_projector.linear_1.", "model.mm_projector.0.")
    return name.replace("multi_modal_projector.linear_2.", "model.mm_projector.2.")


LAYOUTS: dict[str, Callable[[str], str]] = {
    "hub": lambda name: name,
    "saved by transformers 5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "in memory": _in_memory,
    "original": _original,
}
"""How each layout spells a llava-hf name."""


def original_config(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns what the original LLaVA would write for a config whose tower is given separately."""
    return {
        **{name: value for name, value in config["text_config"].items() if name != "model_type"},
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "somebody/clip",
        "tune_mm_mlp_adapter": False,
        **changes,
    }


def write_original(directory: Path, *, tower_inside: bool, dtype: str = "float32", **changes: Any) -> Path:
    """Writes an original LLaVA checkpoint; returns the CLIP directory for --vision, written beside it."""
    config = hf_config()
    tensors = random_tensors(config, dtype=dtype)
    outside = {} if tower_inside else {name: tensors[name] for name in tensors if name.startswith("vision_tower.")}
    inside = {name: tensor for name, tensor in tensors.items() if name not in outside}
    write_hf(directory, original_config(config, **changes), inside, layout="original")
    (directory / "chat_template.jinja").unlink()
    (directory / "preprocessor_config.json").unlink()
    clip = directory.with_name("clip")
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config["vision_config"]}))
    (clip / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    text_half = {
        "text_model.embeddings.token_embedding.weight": np.zeros((2, 2), np.float32),
        "logit_scale": np.zeros(()),
    }
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in outside.items()}
    write_weights(clip, {**text_half, **tower})
    return clip
