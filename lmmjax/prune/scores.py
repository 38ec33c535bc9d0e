"""How much each weight matters: scores from the weights and the mean squares of their inputs.

Weights are (in, out), so the papers' "row of an output" is a column here. All in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Score = Callable[[Float[Array, "in out"], Float[Array, "in"]], Float[Array, "in out"]]


def magnitude(weight: Float[Array, "in out"], x_sq: Float[Array, "in"]) -> Float[Array, "in out"]:
    """Returns |W|; the inputs do not matter."""
    return jnp.abs(weight.astype(jnp.float32))


def wanda(weight: Float[Array, "in out"], x_sq: Float[Array, "in"]) -> Float[Array, "in out"]:
    """Returns |W| times the root mean square of the input. Source: arXiv:2306.11695, equation 1."""
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(x_sq)[:, None]


def lognorm(weight: Float[Array, "in out"], x_sq: Float[Array, "in"]) -> Float[Array, "in out"]:
    """Returns log(1 + |W| / norm of its output's weights + |W| / norm of its input's) * x_sq^(1/4).

    Source: arXiv:2507.20613. A weight whose row or column is all zero scores 0 in that term.
    """
    size = jnp.abs(weight.astype(jnp.float32))
    relative = _share(size, axis=0) + _share(size, axis=1)
    return jnp.log1p(relative) * (x_sq**0.25)[:, None]


SCORES: dict[str, Score] = {"magnitude": magnitude, "wanda": wanda, "lognorm": lognorm}


def _share(size: Float[Array, "in out"], axis: int) -> Float[Array, "in out"]:
    norm = jnp.linalg.norm(size, axis=axis, keepdims=True)
    return size / jnp.where(norm == 0, 1, norm)
