"""Low-rank adapters (LoRA, arXiv:2106.09685) on the decoder's linears: a kernel leaf that holds base and factors."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from lmmjax.config import LINEARS, LlavaConfig
from lmmjax.llava import Params

RANK, ALPHA = 8, 16
SCALE = ALPHA / RANK
Factors = dict[str, dict[str, Any]]
"""{"layers_0": {"q": {"down": (in, r), "up": (r, out)}, ...}, ...}."""


class Adapted(struct.PyTreeNode):
    """A kernel plus a low-rank update, never added up: x @ kernel + x @ down @ up * SCALE."""

    kernel: Float[Array, "in out"]
    down: Float[Array, "in r"]
    up: Float[Array, "r out"]

    def __rmatmul__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        flat = x.reshape(-1, x.shape[-1])
        # As (r, n): a matrix only r wide costs a third more of the whole step (two cores, jax 0.10.2).
        inner = jnp.einsum("ni,ir->rn", flat, self.down)
        out = flat @ self.kernel + jnp.einsum("rn,ro->no", inner, self.up) * SCALE
        return out.reshape(*x.shape[:-1], -1)


def initial_factors(config: LlavaConfig, key: Array) -> Factors:
    """Returns factors whose product is zero: a random `down` and no `up`."""
    factors: Factors = {}
    for layer, layer_key in enumerate(jax.random.split(key, config.text.layers)):
        factors[f"layers_{layer}"] = {}
        for name, one in zip(LINEARS, jax.random.split(layer_key, len(LINEARS)), strict=True):
            inputs, outputs = config.text.linear_shape(name)
            down = jax.random.normal(one, (inputs, RANK)) * inputs**-0.5
            factors[f"layers_{layer}"][name] = {"down": down, "up": jnp.zeros((RANK, outputs))}
    return factors


def adapt(params: Params, factors: Factors) -> Params:
    """Returns params with every adapted kernel in place of its base."""
    text = dict(params["text"])
    for layer, linears in factors.items():
        text[layer] = {
            part: {
                name: {"kernel": Adapted(leaf["kernel"], **linears[name])} if name in linears else leaf
                for name, leaf in content.items()
            }
            if part in ("attn", "mlp")
            else content
            for part, content in text[layer].items()
        }
    return params | {"text": text}
