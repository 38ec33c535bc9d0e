"""Shapes in the place of buffers: the cache that the engine would make."""

from typing import Any

import jax

from lmmjax import engine
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
