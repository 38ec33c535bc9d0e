"""The values' Hadamard rotation folded into the weights that make and take them: W_V H and H W_O, head by head.

Exact in real numbers, since H H = 1. What it costs nothing at run time it takes from sparsity: pruned weights of v
and o would be full again. Source: QuaRot, arXiv:2404.00456, section 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import hadamard
from lmmjax.config import TextConfig
from lmmjax.llava import Params


def fold_values(text: TextConfig, params: Params) -> Params:
    """Returns params whose values come out rotated, and whose attention takes them so; folding twice undoes it."""
    layers = {f"layers_{index}": _fold(text, params["text"][f"layers_{index}"]) for index in range(text.layers)}
    return params | {"text": params["text"] | layers}


def _fold(text: TextConfig, layer: Params) -> Params:
    attn, dim = layer["attn"], text.head_dim
    v, o = attn["v"]["kernel"], attn["o"]["kernel"]
    rotated = {"v": attn["v"] | {"kernel": _by_head(v, dim)}, "o": attn["o"] | {"kernel": _by_head(o.T, dim).T}}
    return layer | {"attn": attn | rotated}


def _by_head(kernel: Float[Array, "in hd"], dim: int) -> Float[Array, "in hd"]:
    """Returns a kernel with each head's outputs rotated."""
    heads = jnp.asarray(kernel).reshape(kernel.shape[0], -1, dim)
    return hadamard.rotate(heads).reshape(kernel.shape).astype(kernel.dtype)
