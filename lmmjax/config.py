"""What a LLaVA is made of, read strictly from a Hugging Face config: nothing unknown passes unnoticed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lmmjax.errors import InputError
from lmmjax.layers import ACTIVATIONS

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven prunable linears of a decoder layer, in the order of every per-linear table."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower. `feature_layers` index its hidden states, 0 being the embedding."""

    width: int
    ffn: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    feature_layers: tuple[int, ...]
    keep_class_token: bool = False
    channels: int = 3
    activation: str = "quick_gelu"
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """How many positions one image takes in the prompt."""
        return self.patches + self.keep_class_token


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Llama / Vicuna / Mistral decoder; `kv_heads < heads` is grouped-query attention."""

    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float = 10000.0
    eps: float = 1e-6
    tied: bool = False

    @property
    def prunable(self) -> int:
        """The weights that pruning may zero: those of all layers' seven linears."""
        return self.layers * sum(math.prod(self.linear_shape(name)) for name in LINEARS)

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Returns (in, out) of one of the seven linears."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, heads),
            "k": (self.width, kv),
            "v": (self.width, kv),
            "o": (heads, self.width),
            "gate": (self.width, self.ffn),
            "up": (self.width, self.ffn),
            "down": (self.ffn, self.width),
        }[name]


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a two-layer projector and a decoder; `image_token` marks an image's positions."""

    vision: VisionConfig
    text: TextConfig
    image_token: int
    projector_activation: str = "gelu"
    projector_bias: bool = True


# Attributes that say nothing about the forward pass (names, training, generation defaults, output switches).
_INERT = frozenset(
    "transformers_version architectures output_hidden_states output_attentions return_dict dtype torch_dtype "
    "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type _name_or_path initializer_range "
    "initializer_factor use_cache pad_token_id bos_token_id eos_token_id attention_dropout pretraining_tp "
    "projection_dim model_type ignore_index _attn_implementation_autoset use_bfloat16 torchscript".split()
)
# What transformers 4 wrote into every part and 5 no longer knows; harmless at these values.
_LEGACY = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "tf_legacy_loss": False,
    "prune_heads": {},
    "pruned_heads": {},
    "finetuning_task": None,
    "task_specific_params": None,
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
    "dropout": 0.0,
}
_VISION = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size num_channels "
    "hidden_act layer_norm_eps vocab_size".split()
)
_TEXT = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_parameters rms_norm_eps tie_word_embeddings sliding_window".split()
)
_LLAVA = frozenset(
    "vision_config text_config image_token_index image_token_id image_seq_length vision_feature_layer "
    "vision_feature_select_strategy projector_hidden_act multimodal_projector_bias tie_word_embeddings "
    "vocab_size".split()
)
_COUNTS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads image_size "
    "patch_size num_channels max_position_embeddings".split()
)


def from_hf(raw: Mapping[str, Any]) -> LlavaConfig:
    """Returns the config that a Hugging Face `config.json` (as a dict) describes.

    Both spellings of transformers 4 and 5 are read; attributes left out have the library's defaults.

    Raises:
        InputError: an attribute is neither handled nor at its default, or a value is out of range; names all.
    """
    if raw.get("model_type") != "llava":
        raise InputError(f"config.json: model_type is {raw.get('model_type')!r}; expected 'llava' (LLaVA 1.5)")
    _require_types(raw)
    full, default = _filled(raw), _filled({})
    vision, text = full["vision_config"], full["text_config"]
    problems = [
        *_unhandled("", full, default, _LLAVA),
        *_unhandled("vision_config.", vision, default["vision_config"], _VISION),
        *_unhandled("text_config.", text, default["text_config"], _TEXT),
        *_out_of_range(full, vision, text),
    ]
    if problems:
        raise InputError(f"config.json: {'; '.join(problems)}. This architecture is not supported as it stands")
    tower = _vision(full, vision)
    # transformers never reads this one, and writes its default into every config that says nothing.
    if full["image_seq_length"] not in (tower.image_tokens, default["image_seq_length"]):
        raise InputError(
            f"config.json: image_seq_length = {full['image_seq_length']!r}, but the vision tower makes"
            f" {tower.image_tokens} tokens of an image"
        )
    return LlavaConfig(
        vision=tower,
        text=_text(full, text),
        image_token=_image_token(full),
        projector_activation=full["projector_hidden_act"],
        projector_bias=full["multimodal_projector_bias"],
    )


def _require_types(raw: Mapping[str, Any]) -> None:
    """Refuses other architectures. Mistral is a Llama up to its sliding window (see `_text`)."""
    for part, known in (("vision_config", ("clip_vision_model",)), ("text_config", ("llama", "mistral"))):
        settings = raw.get(part) or {}
        got = settings.get("model_type", known[0]) if isinstance(settings, Mapping) else settings
        if got not in known:
            raise InputError(f"config.json: {part}.model_type is {got!r}; expected {' or '.join(known)}")


def _filled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with the library's defaults filled in, in the spelling of its current version."""
    from transformers import LlavaConfig as HFLlava  # configuration classes only: no torch, no model code

    try:
        return HFLlava(**raw).to_dict()
    except Exception as error:  # its validators raise many kinds, each over several lines
        raise InputError(f"config.json: {' '.join(str(error).split())}") from error


def _unhandled(prefix: str, got: Mapping, default: Mapping, handled: frozenset[str]) -> list[str]:
    missing = object()
    return [
        f"{prefix}{name} = {value!r} is not handled"
        for name, value in got.items()
        if name not in handled and name not in _INERT and value != default.get(name, _LEGACY.get(name, missing))
    ]


def _out_of_range(full: Mapping, vision: Mapping, text: Mapping) -> list[str]:
    parts = {"vision_config": vision, "text_config": text}
    counts = {f"{part}.{name}": settings[name] for part, settings in parts.items() for name in _COUNTS & set(settings)}
    if small := [f"{name} = {count}, expected at least 1" for name, count in counts.items() if not _is_int(count, 1)]:
        return small
    rope = text["rope_parameters"]
    theta = rope.get("rope_theta", 1.0)
    token, layers = _image_token(full), _feature_layers(full)
    strategy, act = full["vision_feature_select_strategy"], full["projector_hidden_act"]
    checks = [
        (rope.get("rope_type", "default") == "default", f"text_config.rope_parameters = {rope} is not handled"),
        (set(rope) <= {"rope_type", "rope_theta"}, f"text_config.rope_parameters = {rope} is not handled"),
        (_is_positive(theta), f"text_config.rope_theta = {theta!r}, expected a number above 0"),
        (_is_int(_head_dim(text), 2), f"text_config.head_dim = {text['head_dim']!r}, expected at least 2"),
        (_is_int(token, 0), f"image_token_index = {token!r}, expected a token's id"),
        (layers and all(map(_is_int, layers)), f"vision_feature_layer = {layers!r}, expected layers' numbers"),
        (strategy in ("default", "full"), f"vision_feature_select_strategy = {strategy!r}, expected default or full"),
        (act in ACTIVATIONS, f"projector_hidden_act = {act!r}, expected one of {', '.join(ACTIVATIONS)}"),
        (vision["hidden_act"] in ACTIVATIONS, f"vision_config.hidden_act = {vision['hidden_act']!r} is not handled"),
        (full.get("vocab_size") in (None, text["vocab_size"]), "vocab_size is not that of text_config"),
        (vision["image_size"] % vision["patch_size"] == 0, "vision_config.image_size is no multiple of patch_size"),
        (text["num_attention_heads"] % text["num_key_value_heads"] == 0, "query heads are no multiple of kv heads"),
    ]
    return list(dict.fromkeys(message for good, message in checks if not good))


def _is_int(value: object, least: float = -math.inf) -> bool:
    return type(value) is int and value >= least


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # pyright: ignore[reportOperatorIssue]


def _vision(full: Mapping, vision: Mapping) -> VisionConfig:
    layers = vision["num_hidden_layers"]
    wanted = _feature_layers(full)
    states = tuple(layer if layer >= 0 else layers + 1 + layer for layer in wanted)
    if not all(0 <= state <= layers for state in states):
        raise InputError(f"config.json: vision_feature_layer = {wanted}; the tower has {layers} layers")
    return VisionConfig(
        width=vision["hidden_size"],
        ffn=vision["intermediate_size"],
        layers=layers,
        heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        feature_layers=states,
        keep_class_token=full["vision_feature_select_strategy"] == "full",
        channels=vision["num_channels"],
        activation=vision["hidden_act"],
        eps=vision["layer_norm_eps"],
    )


def _text(full: Mapping, text: Mapping) -> TextConfig:
    # Attention through a sliding window is plain attention as long as everything is inside the window.
    window = text.get("sliding_window") or text["max_position_embeddings"]
    return TextConfig(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        ffn=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=_head_dim(text),
        context=min(text["max_position_embeddings"], window),
        rope_theta=float(text["rope_parameters"].get("rope_theta", 10000.0)),
        eps=text["rms_norm_eps"],
        tied=bool(full["tie_word_embeddings"] or text["tie_word_embeddings"]),
    )


def _feature_layers(full: Mapping) -> list[Any]:
    wanted = full["vision_feature_layer"]
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


def _head_dim(text: Mapping) -> int:
    return text["head_dim"] or text["hidden_size"] // text["num_attention_heads"]


def _image_token(full: Mapping) -> int:
    return full["image_token_index"] if full.get("image_token_id") is None else full["image_token_id"]
