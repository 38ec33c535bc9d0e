"""The building blocks that the parts of the model share: Linear, RMSNorm and the activations."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def leaf(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """Returns a parameter of any type: one that is there as it is, otherwise a new array.

    `param` alone would insist on the initializer's shape, which a packed matrix's arrays do not have.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class Linear(nn.Module):
    """y = x @ kernel (+ bias), for a kernel leaf of any type.

    A leaf that is no plain array (a sparse or quantized matrix) takes part by implementing `__rmatmul__`, so neither
    this layer nor the model knows which kinds exist.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = x @ leaf(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y


def joint(names: Iterable[str]) -> str:
    """Returns the name of linears that were joined, such as q_k_v."""
    return "_".join(names)


def linears(module: nn.Module, x: Float[Array, "*batch in"], **features: int) -> Sequence[Float[Array, "*batch out"]]:
    """Returns a Linear's outputs for each name, all of the same x: a single product where the params hold them joined.

    Joined they are a linear of their `joint` name; see `lmmjax.joined`.
    """
    name_of_all = joint(features)
    if not module.has_variable("params", name_of_all):
        return [Linear(count, name=name)(x) for name, count in features.items()]
    *ends, total = itertools.accumulate(features.values())
    return jnp.split(Linear(total, name=name_of_all)(x), ends, axis=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, the mean square in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch e"]) -> Float[Array, "*batch e"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return scale * normed.astype(x.dtype)
