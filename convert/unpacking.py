"""A checkpoint's weights as plain arrays, whatever formats it keeps them in."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from kernels.weights import Matrix
from lmmjax import weights


class DenseReader:
    """Reads like `weights.Reader`, with zeros put back; codes times scales come in the dtype of the embeddings."""

    def __init__(self, directory: Path):
        self._reader = weights.Reader(directory)
        self._stored = self._reader.leaves
        self._dtype = self._stored["text.embedding"].dtype

    @property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """{dotted name: shape and dtype} of all leaves."""
        return {name: self._outline(leaf) if isinstance(leaf, Matrix) else leaf for name, leaf in self._stored.items()}

    def read(self, names: Iterable[str]) -> Mapping[str, np.ndarray]:
        """Returns the leaves with these names."""
        found = self._reader.read(names)
        return {name: self._dense(leaf) if isinstance(leaf, Matrix) else leaf for name, leaf in found.items()}

    def _outline(self, matrix: Matrix) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(matrix.shape, self._dtype if matrix.bits <= 8 else matrix.values.dtype)

    def _dense(self, matrix: Matrix) -> np.ndarray:
        return np.asarray(matrix.dense()).astype(self._outline(matrix).dtype)
