"""Named products with weight matrices: what tests prove of kernels, what compiles, and what is timed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from kernels.gpu.weights.arrange import arranged
from kernels.gpu.weights.layout import Arranged
from kernels.weights import WeightFormat, encode
from kernels.weights.formats import NM, Full, Matrix
from kernels.weights.masks import width

_shape: Any = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix's format and shape, and how many rows of x meet it. `group` None: a row's codes share a scale."""

    kind: str
    bits: int
    group: int | None = None
    shape: tuple[int, int] = (576, 192)
    m: int = 1
    values: DTypeLike = jnp.bfloat16

    def matrix(self, seed: int = 0) -> Matrix:
        """Returns a random canonical matrix, as NumPy arrays."""
        w = np.random.default_rng(seed).standard_normal(self.shape).astype(np.float32) / np.sqrt(self.shape[0])
        if self.kind == "2:4":
            fours = np.abs(w).reshape(-1, 4, self.shape[1])
            w *= (np.argsort(np.argsort(fours, axis=1), axis=1) > 1).reshape(self.shape)
        form = WeightFormat(self.kind, self.bits, self.group)
        return encode(w.astype(self.values) if self.bits == 16 else w, form)

    def x(self, seed: int = 1) -> Float[np.ndarray, "m k"]:
        """Returns rows whose numbers bfloat16 holds, of unlike sizes, with a mean that is not 0."""
        rng = np.random.default_rng(seed)
        x = (rng.standard_normal((self.m, self.shape[0])) + 0.25) * np.exp(rng.standard_normal((self.m, 1)))
        return x.astype(jnp.bfloat16).astype(np.float32)

    def abstract(self) -> Arranged:
        """Returns the matrix as kernels read it, shapes without numbers."""
        (k, r), shape = self.shape, _shape
        group = min(self.group or k, k)
        scales = shape((r, -(-k // group)), jnp.bfloat16) if self.bits < 16 else None
        kept = k if self.kind == "dense" else k // 2
        dtype = {16: self.values, 8: jnp.int8, 4: jnp.uint8}[self.bits]
        values = shape((r, -(-kept // 2) if self.bits == 4 else kept), dtype)
        if self.kind == "dense":
            return jax.eval_shape(arranged, Full(values, scales, k, self.bits, group))
        mask = shape((r, width(k)), jnp.uint8)
        return jax.eval_shape(arranged, NM(values, scales, k, self.bits, group, mask=mask, n=2, m=4))


CASES: dict[str, Case] = {
    "int8": Case("dense", 8),
    "int8, groups of 64, 16 rows": Case("dense", 8, 64, (200, 130), m=16),
    "int4, groups of 128": Case("dense", 4, 128, (1536, 64), m=3),
    "int4, groups of 64": Case("dense", 4, 64, m=8),
    "int4, one scale a row, an odd number of inputs": Case("dense", 4, None, (301, 70)),
    "2:4": Case("2:4", 16, m=2),
    "2:4, rows of 1536, 9 rows": Case("2:4", 16, None, (1536, 64), m=9),
    "2:4 in float16, a part of a tile": Case("2:4", 16, None, (100, 3), values=jnp.float16),
    "2:4 in int8": Case("2:4", 8),
    "2:4 in int8, groups of 128": Case("2:4", 8, 128, (1000, 64), m=5),
    "2:4 in int4, groups of 64": Case("2:4", 4, 64, m=1),
    "2:4 in int4, groups of 128": Case("2:4", 4, 128, (512, 64), m=4),
}
LAYERS: dict[str, dict[str, tuple[int, int, int]]] = {
    "7b": {
        "q, k, v": (4096, 3 * 4096, 1),
        "o": (4096, 4096, 1),
        "gate, up": (4096, 2 * 11008, 1),
        "down": (11008, 4096, 1),
    },
    "13b": {
        "q, k, v": (5120, 3 * 5120, 1),
        "o": (5120, 5120, 1),
        "gate, up": (5120, 2 * 13824, 1),
        "down": (13824, 5120, 1),
    },
}
"""Inputs, outputs and number of the products of a decoder layer of LLaVA-1.5: linears of the same x are joined."""
FORMATS: dict[str, Case] = {
    "2:4": Case("2:4", 16),
    "2:4 int8": Case("2:4", 8),
    "2:4 int4 g128": Case("2:4", 4, 128),
    "int8": Case("dense", 8),
    "int4 g128": Case("dense", 4, 128),
}
"""What is compiled and timed at a layer's shapes."""
CHECKED = 64
"""Outputs whose error is looked at, where float64 would take long for all."""


def product64(x: Array | np.ndarray, matrix: Matrix) -> Float[np.ndarray, "m r"]:
    """Returns the product in float64."""
    return np.asarray(x, np.float64) @ np.asarray(matrix.rows(), np.float64).T
