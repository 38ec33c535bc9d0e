"""Calibration: what each linear of the decoder is fed and how each layer moves the stream, taken layer by layer."""

from collections.abc import Callable, Sequence

from lmmjax.calibrate import walk
from lmmjax.calibrate.statistics import LayerStatistics, LinearStatistics
from lmmjax.config import LlavaConfig
from lmmjax.data import Encoded
from lmmjax.layered import held
from lmmjax.llava import Params

__all__ = ["LayerStatistics", "LinearStatistics", "Transform", "statistics", "transform_layers"]

Transform = Callable[[int, Params, LayerStatistics], Params]


def statistics(
    config: LlavaConfig,
    params: Params,
    samples: Encoded | Sequence[Encoded],
    tokens: str = "all",
    grams: bool = False,
) -> tuple[LayerStatistics, ...]:
    """Returns every layer's statistics, all of the model as it stands (one-shot).

    `tokens` chooses over which positions means run, see `tokens.choose`; `grams` asks for whole Gram matrices.
    """
    walk.check_choice(tokens)
    model = held(config, params)
    rows = walk.embedded(config, model.outer, samples)
    return tuple(
        walk.look(config.text, model.layer(index), rows, tokens, grams, move=True, where=f"layer {index}")
        for index in range(config.text.layers)
    )


def transform_layers(
    config: LlavaConfig,
    params: Params,
    samples: Encoded | Sequence[Encoded],
    transform: Transform,
    tokens: str = "all",
    grams: bool = False,
) -> Params:
    """Returns params with each decoder layer replaced by transform(index, layer, its statistics).

    Sequential: a layer's statistics are taken behind the layers that were replaced before it.
    """
    walk.check_choice(tokens)
    model, text = held(config, params), dict(params["text"])
    rows = walk.embedded(config, model.outer, samples)
    for index in range(config.text.layers):
        layer = model.layer(index)
        stats = walk.look(config.text, layer, rows, tokens, grams, move=False, where=f"layer {index}")
        text[f"layers_{index}"] = transform(index, layer, stats)
        walk.move(config.text, text[f"layers_{index}"], rows)
    return params | {"text": text}
