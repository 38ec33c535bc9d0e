"""The projector of a LLaVA that is put together: from a file, from the text part, or random and to be trained."""

from pathlib import Path

import numpy as np

from convert.names import PEFT_PREFIX, canonical
from convert.parts import Decoder, config
from convert.source import Arrays, Renamed, Source, open_file
from convert.tower import Tower
from lmmjax.config import from_hf
from lmmjax.errors import InputError

_NAME = "multi_modal_projector."


def open_projector(tower: Tower, decoder: Decoder, file: Path | None, seed: int | None) -> Source | None:
    """Returns the projector of `file` or of a random `seed`; None where the decoder's weights hold it.

    Raises:
        InputError: not exactly one of the three.
    """
    inside = any((canonical(name) or "").startswith(_NAME) for name in decoder.weights.tensors)
    given = [option for option, value in (("--projector", file), ("--random-projector", seed)) if value is not None]
    if inside and given:
        raise InputError(f"{given[0]}: the text part holds its projector; leave this out")
    if len(given) > 1:
        raise InputError("--projector: got a file beside --random-projector; expected one of the two")
    if not inside and not given:
        raise InputError(
            "--projector: got none, and the text part holds none; expected a file, or --random-projector SEED for one"
            " that is to be trained"
        )
    if file is not None:
        source = open_file(Path(file))
        return Renamed(source, {name.removeprefix(PEFT_PREFIX): name for name in source.tensors})
    return None if seed is None else random_projector(tower, decoder, seed)


def random_projector(tower: Tower, decoder: Decoder, seed: int) -> Source:
    """Returns an untrained projector in float32: normal weights of variance 1 / inputs, biases of zero.

    Raises:
        InputError: `seed` is negative, or the two parts are not such as are handled.
    """
    if seed < 0:
        raise InputError(f"--random-projector: got {seed}, expected a seed of 0 or more")
    whole = from_hf(config(tower.settings, decoder, image_token=0))
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for part, inputs in (("linear_1", whole.tower.width), ("linear_2", whole.text.width)):
        weight = rng.standard_normal((whole.text.width, inputs), np.float32) * np.float32(inputs**-0.5)
        arrays |= {f"{_NAME}{part}.weight": weight, f"{_NAME}{part}.bias": np.zeros(whole.text.width, np.float32)}
    return Arrays(arrays)
