"""From a question and images to token ids and pixels, and from ids back to text: the checkpoint's own processor."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError, is_unicode
from lmmjax.files import read_json

Picture = str | Path | Image.Image


@dataclasses.dataclass(frozen=True)
class Processor:
    """A checkpoint's tokenizer, chat template and image preprocessing.

    Its ids and pixels are those of transformers' `LlavaProcessor`, without torch or torchvision. To a decoder alone,
    whose `image_token` is None, no text stands for an image.
    """

    config: LlavaConfig
    directory: Path
    tokenizer: Any
    template: str | None
    image_token: str | None
    eos: tuple[int, ...]

    @classmethod
    def load(cls, directory: str | Path, config: LlavaConfig) -> "Processor":
        """Returns the processor of the files in a checkpoint's directory.

        Raises:
            InputError: there is no tokenizer, or it knows the image token by another id than the config.
        """
        directory = Path(directory)
        settings = _settings(directory / "processor_config.json")
        tokenizer = _tokenizer(directory)
        image_token = _image_token(tokenizer, settings, config) if config.sees else None
        template = _template(directory, settings, tokenizer)
        return cls(config, directory, tokenizer, template, image_token, _eos(directory, tokenizer))

    def render(self, question: str, images: int, system: str | None = None) -> str:
        """Returns the prompt that asks `question` about so many images, in the checkpoint's chat template.

        A question that holds placeholders keeps them where they are. Otherwise a template that knows images
        places them; without one, a line with a placeholder per image comes first.

        Raises:
            InputError: the template refuses or drops the system text, or there is no template to hold it; or there
                are images, and no tower that sees them.
        """
        self._require_sight(images)
        placed = self.image_token is not None and self.image_token in question
        knows_images = self.config.sees and self.template is not None and "image" in self.template
        if not placed and not knows_images:
            question = f"{self.image_token}\n" * images + question
        if self.template is None:
            if system:
                raise InputError("--system: this checkpoint has no chat template; write the text into --prompt")
            return question

        def content(text: str, shown: int = 0) -> Any:
            parts = [{"type": "image"}] * shown + [{"type": "text", "text": text}]
            return parts if knows_images else text

        turns = [{"role": "system", "content": content(system)}] if system else []
        rendered = self._fill([*turns, {"role": "user", "content": content(question, 0 if placed else images)}])
        if system and system.strip() not in rendered:
            raise InputError("--system: this checkpoint's chat template has no place for a system text; leave it out")
        return rendered

    def encode(self, text: str, images: int) -> list[int]:
        """Returns the prompt's ids, each placeholder expanded into its image's tokens.

        The tokenizer adds its beginning-of-text token unless the text starts with it already.

        Raises:
            InputError: placeholders and images differ in number, the prompt is longer than the context, or it is
                no Unicode text; or there are images, and no tower that sees them.
        """
        if not is_unicode(text):
            raise InputError(f"prompt: {text[:80]!r} holds half a character (a lone surrogate); expected UTF-8 text")
        bos = self.tokenizer.bos_token
        expanded = self._expanded(text, images)
        ids = self.tokenizer.encode(expanded, add_special_tokens=not (bos and text.startswith(bos)))
        if not ids:
            raise InputError("prompt: got an empty text, expected at least one token")
        if len(ids) > self.config.text.context:
            context = self.config.text.context
            raise InputError(f"prompt: {len(ids)} tokens do not fit the model's context of {context}; shorten it")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def pixels(self, images: Sequence[Picture]) -> Float[np.ndarray, "n c y x"]:
        """Returns images as the vision tower takes them: resized, cropped and normalized by the checkpoint's rules.

        Raises:
            InputError: an image cannot be read, or the preprocessor makes another size than the tower takes; or there
                are images, and no tower.
        """
        self._require_sight(len(images))
        shape = self.config.image_shape
        if not images:
            return np.zeros((0, *shape), np.float32)
        opened = [open_image(image) for image in images]
        values = np.stack(self._image_processor(opened)["pixel_values"]).astype(np.float32)
        if values.shape[1:] != shape:
            raise InputError(
                f"{self.directory}: the image preprocessor makes {values.shape[1:]}, the vision tower takes"
                f" {shape}; its size and crop_size must fit config.json"
            )
        return values

    @functools.cached_property
    def _image_processor(self) -> Any:
        """Made when first needed: text alone needs none, and importing it takes seconds where torch is installed."""
        return _image_processor(self.directory)

    def _require_sight(self, images: int) -> None:
        if images and not self.config.sees:
            raise InputError(
                f"image: {self.directory} has no vision tower and reads text alone, but what it is asked shows an"
                " image; leave images out, or give a LLaVA"
            )

    def _expanded(self, text: str, images: int) -> str:
        """Returns the text with each placeholder as often as its image has tokens."""
        self._require_sight(images)
        if self.image_token is None:
            return text
        found = text.count(self.image_token)
        if images and not found:
            raise InputError(
                f"prompt: no image token; got {images} image(s), so put {self.image_token} where they belong"
            )
        if found != images:
            raise InputError(f"prompt: {found} {self.image_token} for {images} image(s); expected one for each")
        return text.replace(self.image_token, self.image_token * self.config.image_tokens)

    def _fill(self, turns: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InputError(f"chat template: {error}") from error


def open_image(source: Picture | BinaryIO, name: object = None) -> Image.Image:
    """Returns an image in RGB, turned as its EXIF orientation says.

    Raises:
        InputError: it cannot be read; the message calls it by `name`, by default its path.
    """
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image that can be read"
        raise InputError(f"image {name or source}: {reason}") from error


def bucket(n: int) -> int:
    """Returns the length that n tokens are padded to: multiples of 16, then quarters of an octave.

    At most a fifth of a bucket is padding beyond 64 tokens, and an octave of lengths takes four programs.
    """
    step = max(16, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def pad(
    prompts: Sequence[Sequence[int]], to: int | None = None, pad_id: int = 0
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Returns prompts as one array, padded on the right to `to` (else to a bucket), and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), to or bucket(int(lengths.max()))), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
        raise InputError(f"{directory}: no tokenizer.json or tokenizer.model; the checkpoint must carry its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a file that it cannot read
        raise InputError(f"{directory}: cannot read the tokenizer ({error})") from error


def _image_token(tokenizer: Any, settings: dict[str, Any], config: LlavaConfig) -> str:
    """Returns the image token, which has the config's id; the original LLaVA's tokenizer has yet to learn it."""
    image_token = getattr(tokenizer, "image_token", None) or settings.get("image_token", "<image>")
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([image_token], special_tokens=True)
    got = tokenizer.convert_tokens_to_ids(image_token)
    if got != config.image_token:
        raise InputError(
            f"tokenizer: {image_token} has id {got}, config.json's image token is {config.image_token}; they must agree"
        )
    return image_token


def _template(directory: Path, settings: dict[str, Any], tokenizer: Any) -> str | None:
    """Returns the chat template, the places tried in transformers' order."""
    legacy = _settings(directory / "chat_template.json").get("chat_template")
    named = settings.get("chat_template") or legacy or tokenizer.chat_template
    return named.get("default") if isinstance(named, dict) else named


def _eos(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end an answer: the tokenizer's, then any more that generation_config.json names."""
    more = _settings(directory / "generation_config.json").get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _image_processor(directory: Path) -> Any:
    # Imported from their own files: transformers' own choice of the default classes insists on torchvision.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kinds = {"CLIPImageProcessor": CLIPImageProcessorPil, "LlavaImageProcessor": LlavaImageProcessorPil}
    found = next((raw for raw in _image_settings(directory) if raw), None)
    if found is None:
        raise InputError(f"{directory}: no preprocessor_config.json; the checkpoint must carry its image preprocessor")
    name = found.get("image_processor_type") or found.get("feature_extractor_type") or "CLIPImageProcessor"
    kind = kinds.get(name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor"))
    if kind is None:
        raise InputError(f"{directory}: image_processor_type is {name}, expected one of {', '.join(kinds)}")
    return kind.from_dict(found)


def _image_settings(directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the image processor's settings from where transformers 5 and where 4 writes them."""
    yield _settings(directory / "processor_config.json").get("image_processor", {})
    yield _settings(directory / "preprocessor_config.json")


def _settings(file: Path) -> dict[str, Any]:
    """Returns what a file says that a checkpoint need not have."""
    return read_json(file) if file.is_file() else {}
