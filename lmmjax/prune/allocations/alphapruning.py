"""AlphaPruning: layers whose weights' spectra have heavier tails are trained better, and keep more."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lmmjax.errors import InputError
from lmmjax.linears import kernels_of
from lmmjax.llava import Params
from lmmjax.prune.allocations.evidence import Evidence, over_linears
from lmmjax.prune.allocations.shares import unit_range

_ROUNDING = 1e-6
"""What float32 leaves uncertain of an eigenvalue, relative to the largest."""


def alphapruning(evidence: Evidence, eps: float = 0.3) -> Float[np.ndarray, "l 7"]:
    """Returns sparsities linear in the layers' mean alpha, from (1 - eps) to (1 + eps) before they are rescaled.

    ratio_l = (alpha_l - min) / (max - min) * 2 eps + 1 - eps, times what brings its mean to the target: the largest
    alpha, the lightest tail, is pruned most. All layers have as many weights, so a plain mean is the budget's.

    Source: AlphaPruning, arXiv:2410.10912, its map by blocks. Here the tail starts at the median, `xmin_mid` of its
    published code; that code's default, the density's peak, needs a histogram and a search around it.
    """
    alphas = np.array([layer_alpha(index, layer) for index, layer in enumerate(evidence.layers())])
    ratio = unit_range(alphas) * 2 * eps + 1 - eps
    return over_linears(evidence.sparsity * ratio / ratio.mean())


def layer_alpha(index: int, layer: Params) -> float:
    """Returns the mean over a layer's linears of their spectra's power-law exponents.

    Raises:
        InputError: a linear's spectrum has no tail: most of it is zero, or all above the median is one value.
    """
    alphas = {name: hill_alpha(np.asarray(spectrum(weight))) for name, weight in kernels_of(layer).items()}
    if bad := [name for name, alpha in alphas.items() if not np.isfinite(alpha)]:
        raise InputError(
            f"allocation alphapruning: got no tail of eigenvalues in layer {index}'s {', '.join(bad)}, expected"
            " trained weights of full rank; use another allocation"
        )
    return float(np.mean(list(alphas.values())))


def hill_alpha(eigenvalues: Float[np.ndarray, "n"]) -> float:
    """Returns 1 + k / sum_i log(lambda_i / lambda_min) over the k eigenvalues from the median up; NaN for no tail."""
    tail = eigenvalues[len(eigenvalues) // 2 :].astype(np.float64)
    if not tail[0] > _ROUNDING * tail[-1]:
        return np.nan
    excess = np.log(tail / tail[0]).mean()
    return float(1 + 1 / excess) if excess > _ROUNDING else np.nan


@jax.jit
def spectrum(weight: Float[Array, "in out"]) -> Float[Array, "n"]:
    """Returns the eigenvalues of W^T W, ascending, without the zeros that only its shape makes; in float32.

    They are those of the smaller of W^T W and W W^T: 4096 of a 4096 x 11008 matrix.
    """
    wide = weight.astype(jnp.float32)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    return jnp.linalg.eigvalsh(jnp.matmul(wide, wide.T, precision="highest"))
