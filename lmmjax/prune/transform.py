"""Pruning a parameter tree: params in, params out, and what is not pruned stays the very same object."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from jaxtyping import Array, Bool, Float, Int

from lmmjax import calibrate
from lmmjax.calibrate import LayerStatistics
from lmmjax.config import LINEARS, LlavaConfig
from lmmjax.data import Encoded
from lmmjax.errors import InputError
from lmmjax.linears import kernel_of, with_kernels
from lmmjax.llava import Params
from lmmjax.plan import Plan
from lmmjax.prune.masks import drop_lowest, rank, zeroed
from lmmjax.prune.scores import SCORES, Score

Ranks = tuple[dict[str, Int[Array, "in out"]], ...]
LayerMasks = Mapping[str, Bool[Array, "in out"] | None]
"""Which weights of a layer's linears stay; None leaves a linear alone."""
Mask = Callable[[int, str, Float[Array, "in out"]], Bool[Array, "in out"] | None]
"""From layer, linear and score to the mask: where ratios, counts and N:M patterns enter."""


def apply_masks(params: Params, masks: Sequence[LayerMasks]) -> Params:
    """Returns params with the masked weights zero."""
    layers = {f"layers_{i}": _mask_layer(params["text"][f"layers_{i}"], mask) for i, mask in enumerate(masks)}
    return params | {"text": params["text"] | layers}


def prune(
    config: LlavaConfig,
    params: Params,
    encoded: Encoded,
    score: str,
    mask: Mask,
    tokens: str = "all",
    sequential: bool = True,
) -> Params:
    """Returns params pruned by a score; `mask` turns a linear's score into what stays of it.

    Sequential statistics see the layers before already pruned, as the published pruners do; one-shot
    statistics are the dense model's, so that one pass serves every allocation.
    """
    chosen = _score(score)

    def transform(index: int, layer: Params, stats: LayerStatistics) -> Params:
        scores = {name: chosen.rule(kernel_of(layer, name), stats[name]) for name in LINEARS}
        return _mask_layer(layer, {name: mask(index, name, value) for name, value in scores.items()})

    if sequential:
        return calibrate.transform_layers(config, params, encoded, transform, tokens)
    stats = calibrate.statistics(config, params, encoded, tokens)
    layers = {f"layers_{i}": transform(i, params["text"][f"layers_{i}"], s) for i, s in enumerate(stats)}
    return params | {"text": params["text"] | layers}


def rank_model(
    config: LlavaConfig,
    params: Params,
    stats: Sequence[LayerStatistics],
    score: str,
    order: Callable[[Float[Array, "in out"]], Int[Array, "in out"]] | None = None,
) -> Ranks:
    """Returns every prunable weight's rank within its output: computed once, it serves every plan.

    `order` makes ranks of scores, by default over what the score is compared over; another may bring a pattern in.
    """
    chosen = _score(score)
    order = order or functools.partial(rank, over=chosen.over)
    ranked = jax.jit(lambda weight, stats: order(chosen.rule(weight, stats)))
    return tuple(
        {name: ranked(kernel_of(params["text"][f"layers_{i}"], name), layer[name]) for name in LINEARS}
        for i, layer in enumerate(stats)
    )


def masked(params: Params, ranks: Ranks, drops: Int[Array, "l 7"]) -> Params:
    """Returns params with the drops[l, i] lowest weights of every output of linear i zero; drops may be traced."""
    return apply_masks(
        params,
        [
            {name: drop_lowest(layer[name], drops[index, i]) for i, name in enumerate(LINEARS)}
            for index, layer in enumerate(ranks)
        ],
    )


def apply_plan(config: LlavaConfig, params: Params, ranks: Ranks, plan: Plan) -> Params:
    """Returns params with the plan's counts dropped; a linear that drops nothing stays the same object."""
    plan.check(config.text)
    return apply_masks(
        params,
        [
            {name: drop_lowest(layer[name], count) if count else None for name, count in chosen.drop.items()}
            for layer, chosen in zip(ranks, plan.layers, strict=True)
        ],
    )


def _mask_layer(layer: Params, masks: LayerMasks) -> Params:
    """Returns the layer with masked kernels zero; only dicts on the way to a masked kernel are new."""
    return with_kernels(
        layer, {name: zeroed(kernel_of(layer, name), keep) for name, keep in masks.items() if keep is not None}
    )


def _score(name: str) -> Score:
    if name not in SCORES:
        raise InputError(f"score: got {name!r}, expected one of {', '.join(SCORES)}")
    return SCORES[name]
