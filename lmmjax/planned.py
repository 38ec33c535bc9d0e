"""Shapes in the place of buffers: the weights of a config's checkpoint, and the cache that the engine would make."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lmmjax import engine, llava
from lmmjax.cache import Cache
from lmmjax.config import LlavaConfig
from lmmjax.llava import Params
from lmmjax.plan import Plan


def planned_cache(
    config: LlavaConfig, params: Params, plan: Plan | None, batch: int, capacity: int, images: int = 0
) -> Cache:
    """Returns the cache that the engine would make, with shapes in the place of its buffers."""
    make: Any = lambda: engine.new_cache(config, params, plan, batch, capacity, images)  # noqa: E731
    return jax.eval_shape(make)


def planned_params(config: LlavaConfig, dtype: str = "bfloat16") -> Params:
    """Returns shapes in the place of all weights that a checkpoint of this config holds.

    They include what no forward pass needs: the tower's layers behind the last feature, and its post-norm.
    """
    vision = config.vision
    last = (vision.layers,) * len(vision.feature_layers)  # so that every layer is run
    whole = dataclasses.replace(config, vision=dataclasses.replace(vision, feature_layers=last))
    tree: Any = jax.eval_shape(lambda: llava.init(whole, jax.random.key(0)))
    norm = jax.ShapeDtypeStruct((vision.width,), jnp.float32)
    tree = {**tree, "vision": {**tree["vision"], "post_norm": {"scale": norm, "bias": norm}}}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
