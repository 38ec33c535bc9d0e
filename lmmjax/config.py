"""What a LLaVA is made of, read strictly from a Hugging Face config: nothing unknown passes unnoticed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lmmjax import hf_config
from lmmjax.errors import InputError
from lmmjax.hf_config import DECODERS, broken, is_int
from lmmjax.layers import ACTIVATIONS

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven prunable linears of a decoder layer, in the order of every per-linear table."""

NO_TOKEN = -2
"""An id that no token has, nor padding (-1 in `llava.embed`)."""


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

    def dropped(self, inputs: Mapping[str, int]) -> int:
        """Returns how many weights go with so many inputs of each of a layer's linears."""
        return sum(count * self.linear_shape(name)[1] for name, count in inputs.items())

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
    """A vision tower, a two-layer projector and a decoder; `image_token` marks an image's positions.

    Without a tower, `vision` and `image_token` being None, it is a decoder alone, which reads text.
    """

    vision: VisionConfig | None
    text: TextConfig
    image_token: int | None
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def sees(self) -> bool:
        """Whether there is a vision tower."""
        return self.vision is not None

    @property
    def tower(self) -> VisionConfig:
        """The vision tower; raises InputError for a decoder alone."""
        if self.vision is None:
            raise InputError("model: a decoder alone, which has no vision tower; expected a LLaVA")
        return self.vision

    @property
    def image_tokens(self) -> int:
        """How many positions one image takes in the prompt; 0 without a tower."""
        return 0 if self.vision is None else self.vision.image_tokens

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the pixels of one image; all 0 without a tower."""
        if self.vision is None:
            return 0, 0, 0
        return self.vision.channels, self.vision.image_size, self.vision.image_size

    def is_image(self, tokens: Any) -> Any:
        """Returns which of an array's token ids stand for images: without a tower none."""
        return tokens == (NO_TOKEN if self.image_token is None else self.image_token)


def from_hf(raw: Mapping[str, Any]) -> LlavaConfig:
    """Returns the config that a Hugging Face `config.json` (as a dict) describes: a LLaVA, or a decoder alone.

    Both spellings of transformers 4 and 5 are read; attributes left out have the library's defaults.

    Raises:
        InputError: an attribute is neither handled nor at its default, or a value is out of range; names all.
    """
    kind = raw.get("model_type")
    if kind not in ("llava", *DECODERS):
        raise InputError(
            f"config.json: model_type is {kind!r}; expected 'llava' (LLaVA 1.5), or {_either(DECODERS)} for text alone"
        )
    return _llava(raw) if kind == "llava" else _decoder_alone(raw)


def _llava(raw: Mapping[str, Any]) -> LlavaConfig:
    _require_types(raw)
    full, default = hf_config.filled(raw), hf_config.filled({"model_type": "llava"})
    vision, text = full["vision_config"], full["text_config"]
    _refuse(
        *hf_config.unhandled("", full, default, hf_config.LLAVA),
        *hf_config.unhandled("vision_config.", vision, default["vision_config"], hf_config.VISION),
        *hf_config.unhandled("text_config.", text, default["text_config"], hf_config.TEXT),
        *_out_of_range(full, vision, text),
    )
    tower = _vision(full, vision)
    # transformers never reads this one, and writes its default into every config that says nothing.
    if full["image_seq_length"] not in (tower.image_tokens, default["image_seq_length"]):
        raise InputError(
            f"config.json: image_seq_length = {full['image_seq_length']!r}, but the vision tower makes"
            f" {tower.image_tokens} tokens of an image"
        )
    return LlavaConfig(
        vision=tower,
        text=_text(text, tied=bool(full["tie_word_embeddings"] or text["tie_word_embeddings"])),
        image_token=_image_token(full),
        projector_activation=full["projector_hidden_act"],
        projector_bias=full["multimodal_projector_bias"],
    )


def _decoder_alone(raw: Mapping[str, Any]) -> LlavaConfig:
    text, default = hf_config.filled(raw), hf_config.filled({"model_type": raw["model_type"]})
    problems = hf_config.small_counts("", text) or hf_config.decoder_problems("", text)
    _refuse(*hf_config.unhandled("", text, default, hf_config.TEXT), *problems)
    return LlavaConfig(vision=None, text=_text(text, tied=bool(text["tie_word_embeddings"])), image_token=None)


def _refuse(*problems: str) -> None:
    if problems:
        raise InputError(f"config.json: {'; '.join(problems)}. This architecture is not supported as it stands")


def _require_types(raw: Mapping[str, Any]) -> None:
    """Refuses other architectures inside of a LLaVA."""
    for part, known in (("vision_config", ("clip_vision_model",)), ("text_config", DECODERS)):
        settings = raw.get(part) or {}
        got = settings.get("model_type", known[0]) if isinstance(settings, Mapping) else settings
        if got not in known:
            raise InputError(f"config.json: {part}.model_type is {got!r}; expected {' or '.join(known)}")


def _out_of_range(full: Mapping, vision: Mapping, text: Mapping) -> list[str]:
    small = hf_config.small_counts("vision_config.", vision) + hf_config.small_counts("text_config.", text)
    if small:
        return small
    token, layers = _image_token(full), _feature_layers(full)
    strategy, act = full["vision_feature_select_strategy"], full["projector_hidden_act"]
    return hf_config.decoder_problems("text_config.", text) + broken(
        (is_int(token, 0), f"image_token_index = {token!r}, expected a token's id"),
        (layers and all(map(is_int, layers)), f"vision_feature_layer = {layers!r}, expected layers' numbers"),
        (strategy in ("default", "full"), f"vision_feature_select_strategy = {strategy!r}, expected default or full"),
        (act in ACTIVATIONS, f"projector_hidden_act = {act!r}, expected one of {', '.join(ACTIVATIONS)}"),
        (vision["hidden_act"] in ACTIVATIONS, f"vision_config.hidden_act = {vision['hidden_act']!r} is not handled"),
        (full.get("vocab_size") in (None, text["vocab_size"]), "vocab_size is not that of text_config"),
        (vision["image_size"] % vision["patch_size"] == 0, "vision_config.image_size is no multiple of patch_size"),
    )


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


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


def _text(text: Mapping, tied: bool) -> TextConfig:
    # Attention through a sliding window is plain attention as long as everything is inside the window.
    window = text.get("sliding_window") or text["max_position_embeddings"]
    return TextConfig(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        ffn=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=hf_config.head_dim(text),
        context=min(text["max_position_embeddings"], window),
        rope_theta=float(text["rope_parameters"].get("rope_theta", 10000.0)),
        eps=text["rms_norm_eps"],
        tied=tied,
    )


def _feature_layers(full: Mapping) -> list[Any]:
    wanted = full["vision_feature_layer"]
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


def _image_token(full: Mapping) -> int:
    return full["image_token_index"] if full.get("image_token_id") is None else full["image_token_id"]
