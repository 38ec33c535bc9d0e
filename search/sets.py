"""The three sets of samples of a search: to calibrate on, to search on, and to report on, with no image in common."""

import dataclasses
from collections.abc import Sequence

from lmmjax import data
from lmmjax.data import Sample


@dataclasses.dataclass(frozen=True)
class Sets:
    """The samples, and in words where each set comes from."""

    calibration: list[Sample]
    search: list[Sample]
    report: list[Sample]
    origin: dict[str, str]


def take(spec: str, calibration: int, search: int, report: int, seed: int) -> Sets:
    """Returns disjoint sets of these sizes: easy-VQA's report set from its test split, all others from `train`.

    A JSONL file knows no splits, so there the report set too is chosen from the one file, by image. The
    calibration set is the one that `prune.replay` draws for a plan with this data, size and seed.

    Raises:
        InputError: the data cannot be read or have too few images.
    """
    train = data.load(spec, "train")
    (calibrating,) = data.disjoint(train, [calibration], seed)
    rest = without_images_of(train, calibrating)
    if spec == data.EASY_VQA:
        (searching,) = data.disjoint(rest, [search], seed)
        (reporting,) = data.disjoint(data.load(spec, "test"), [report], seed)
        splits = ("train", "train", "test")
    else:
        searching, reporting = data.disjoint(rest, [search, report], seed)
        splits = ("its own images",) * 3
    named = {"calibration": calibrating, "search": searching, "report": reporting}
    origin = {name: _origin(spec, split, samples) for (name, samples), split in zip(named.items(), splits, strict=True)}
    return Sets(calibrating, searching, reporting, origin)


def without_images_of(samples: Sequence[Sample], taken: Sequence[Sample]) -> list[Sample]:
    """Returns the samples whose image none of `taken` shows."""
    images = {sample.image for sample in taken}
    return [sample for sample in samples if sample.image not in images]


def _origin(spec: str, split: str, samples: Sequence[Sample]) -> str:
    images = len({sample.image for sample in samples})
    return f"{len(samples)} questions on {images} images of {spec}, {split}"
