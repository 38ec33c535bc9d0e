"""A CLIP directory as LLaVA's vision tower, at its own image size or at another."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from convert.source import Renamed, Source, open_source
from lmmjax.checkpoint import read_json
from lmmjax.errors import InputError

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
        InputError: `size` is no positive multiple of the patch size.
    """
    patch = tower.settings.get("patch_size", 32)  # the default of CLIP's configuration
    if size < patch or size % patch:
        raise InputError(f"--image-size: got {size}, expected a multiple of the tower's patch size {patch}")
    preprocessor = {**tower.preprocessor, "size": {"shortest_edge": size}}
    if "crop_size" in preprocessor:
        preprocessor["crop_size"] = {"height": size, "width": size}
    return Tower(
        {**tower.settings, "image_size": size}, _Resized(tower.weights, (size // patch) ** 2 + 1), preprocessor
    )


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
    """A tower's weights with position embeddings for so many positions, the class token's first."""

    def __init__(self, source: Source, positions: int):
        self._source, self._positions = source, positions
        self.tensors = {
            name: ((positions, *shape[1:]), dtype) if _is_position(name) else (shape, dtype)
            for name, (shape, dtype) in source.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        array = self._source.read(name)
        if not _is_position(name) or len(array) == self._positions:
            return array
        side = round((len(array) - 1) ** 0.5)
        grid = array[1:].reshape(side, side, -1)
        patches = resample(grid, round((self._positions - 1) ** 0.5)).reshape(self._positions - 1, -1)
        return np.concatenate([array[:1], patches.astype(array.dtype)])


def _is_position(name: str) -> bool:
    return re.search(r"(^|\.)position_embedding\.weight$", name) is not None
