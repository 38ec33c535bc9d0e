"""ECoFLaP: layers to whose weights the loss is more sensitive keep more; no gradient, two losses a layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmmjax.linears import kernels_of, with_kernels
from lmmjax.llava import Params
from lmmjax.prune.allocations.evidence import Evidence, over_linears, require_numbers
from lmmjax.prune.allocations.shares import capped


def ecoflap(evidence: Evidence, eps: float = 1e-3, slack: float = 0.1) -> Float[np.ndarray, "l 7"]:
    """Returns sparsities that leave each layer weights in proportion to its sensitivity, at most target + slack.

    Every layer keeps 1 - target - slack, and what is left of the budget is dealt out in proportion.

    Source: ECoFLaP, arXiv:2310.02998, by blocks. Its published code perturbs one matrix at a time, draws anew for each
    batch and adds up sizes; here a layer's seven matrices move along one direction, and the loss is that of all
    samples: two losses a layer instead of fourteen.
    """
    assert evidence.loss is not None, "`wish` says what is missing"
    keys = jax.random.split(jax.random.key(evidence.seed), evidence.text.layers)
    layers = enumerate(zip(evidence.layers(), keys, strict=True))
    importance = np.array([sensitivity(evidence.loss, i, layer, key, eps) for i, (layer, key) in layers])
    require_numbers("ecoflap", "loss", importance)
    return over_linears(capped(importance, evidence.sparsity, slack))


def sensitivity(loss: Callable[[int, Params], float], index: int, layer: Params, key: Array, eps: float) -> float:
    """Returns |loss(W + eps z) - loss(W - eps z)| / (2 eps) along one Gaussian direction z of a layer's weights."""
    up = float(loss(index, perturbed(layer, key, eps)))
    down = float(loss(index, perturbed(layer, key, -eps)))
    return abs(up - down) / (2 * eps)


def perturbed(layer: Params, key: Array, eps: float) -> Params:
    """Returns the layer with eps z added to its seven linears; z follows from the key, so it is never kept."""
    kernels = enumerate(kernels_of(layer).items())
    return with_kernels(layer, {name: _moved(kernel, jax.random.fold_in(key, i), eps) for i, (name, kernel) in kernels})


@jax.jit
def _moved(kernel: Float[Array, "in out"], key: Array, eps: Float[Array, ""]) -> Float[Array, "in out"]:
    # Added in float32, so that weights of 16 bits are rounded once and not at every step.
    return (kernel.astype(jnp.float32) + eps * jax.random.normal(key, kernel.shape)).astype(kernel.dtype)
