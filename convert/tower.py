"""A CLIP directory as LLaVA's vision tower, at its own image size or at another."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from convert.source import Renamed, Source, open_source
from lmmjax.errors import InputError
from lmmjax.files import read_json

PREPROCESSOR = "preprocessor_config.json"
_OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


@dataclasses.dataclass(frozen=True)
class Tower:
    """The vision tower: its `vision_config`, its weights under LLaVA's names and its image preprocessing."""

    settings: Mapping[str, Any]
    weights: Source
    preprocessor: Mapping[str, Any]


def open_tower(directory: Path) -> Tower:
    """Returns the tower of a CLIP directory, whether it holds the text half, too, or not.

    Raises:
        InputError: no config, no weights, or damaged ones.
    """
    settings = vision_config(directory)
    return Tower(settings, tower_of(directory), preprocessor(settings, directory))


def tower_of(directory: Path) -> Source:
    """Returns a CLIP directory's tower under LLaVA's names; its text half stays behind."""
    source = open_source(directory)
    return Renamed(
        source, {f"vision_tower.{name}": name for name in source.tensors if not name.startswith(_OTHER_HALF)}
    )


def vision_config(directory: Path) -> Mapping[str, Any]:
    """Returns the `vision_config` of a CLIP directory."""
    clip = read_json(directory / "config.json")
    part = clip.get("vision_config", clip)
    return {**part, "model_type": "clip_vision_model"} if clip.get("model_type") == "clip" else part


def preprocessor(settings: Mapping[str, Any], *directories: Path | None) -> Mapping[str, Any]:
    """Returns the first directory's image preprocessing that has one, else that of OpenAI's CLIP."""
    for directory in directories:
        if directory is not None and (directory / PREPROCESSOR).exists():
            return read_json(directory / PREPROCESSOR)
    size = settings.get("image_size", 224)  # the default of CLIP's configuration
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


def resized(tower: Tower, size: int) -> Tower:
    """Returns the tower for images of size x size pixels.

    The class token keeps its position embedding; those of the patches are resampled as `resample` does. What
    comes out is a plain CLIP tower of that image size.

    Raises:
        InputError: `size` is no positive multiple of the patch size, or there are other position embeddings than
            the tower's config says.
    """
    patch = tower.settings.get("patch_size", 32)  # the default of CLIP's configuration
    if size < patch or size % patch:
        raise InputError(f"--image-size: got {size}, expected a multiple of the tower's patch size {patch}")
    weights = _Resized(tower.weights, tower.settings.get("image_size", 224) // patch, size // patch)
    return Tower({**tower.settings, "image_size": size}, weights, _preprocessor_at(tower.preprocessor, size))


def _preprocessor_at(preprocessor: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the preprocessing for images of size x size pixels; it goes on to crop, or else to squeeze."""
    square = {"height": size, "width": size}
    old = preprocessor.get("size")
    is_squeezed = isinstance(old, Mapping) and "height" in old
    return {**preprocessor, "size": square if is_squeezed else {"shortest_edge": size}, "crop_size": square}


def resample(grid: Float[np.ndarray, "y x e"], size: int) -> Float[np.ndarray, "size size e"]:
    """Returns a grid of vectors at another resolution, bicubic, in float32.

    Equal to torch's `interpolate(mode="bicubic", align_corners=False)`, as transformers'
    `interpolate_pos_encoding` calls it: pixel centres at halves, Keys' kernel with a = -0.75, edges repeated.

    Source: Keys, Cubic convolution interpolation for digital image processing (1981), equation 4.
    """
    rows, columns = (_weights(length, size) for length in grid.shape[:2])
    return np.einsum("ay,bx,yxe->abe", rows, columns, grid.astype(np.float64)).astype(np.float32)


def _weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns what each old sample contributes to each new one."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
    weights = np.zeros((new, old))
    places = np.arange(new)[:, None], np.clip(taps, 0, old - 1)
    np.add.at(weights, places, _kernel(np.abs(centre[:, None] - taps)))
    return weights


def _kernel(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


class _Resized(Source):
    """A tower's weights with position embeddings, the class token's first, for another number of patches a side."""

    def __init__(self, source: Source, old: int, new: int):
        self._source, self._old, self._new = source, old, new
        self.tensors = dict(source.tensors)
        for name in filter(_is_position, source.tensors):
            (count, *rest), dtype = source.tensors[name]
            if count != old**2 + 1:
                raise InputError(f"--image-size: {name} has {count} rows, expected {old**2 + 1} by the config.json")
            self.tensors[name] = (new**2 + 1, *rest), dtype

    def read(self, name: str) -> np.ndarray:
        array = self._source.read(name)
        if not _is_position(name) or self._old == self._new:
            return array
        grid = array[1:].reshape(self._old, self._old, -1)
        patches = resample(grid, self._new).reshape(self._new**2, -1)
        return np.concatenate([array[:1], patches.astype(array.dtype)])


def _is_position(name: str) -> bool:
    return re.search(r"(^|\.)position_embedding\.weight$", name) is not None
