"""A store that keeps every token in the buffer's own dtype."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.stores.base import Shape, Visual, nbytes, positions, within, write


class Dense(struct.PyTreeNode):
    """Every token in the buffer's own dtype."""

    values: Float[Array, "b h s d"]

    @classmethod
    def empty(cls, shape: Shape, dtype: DTypeLike) -> "Dense":
        return cls(jnp.zeros(shape, dtype))

    @property
    def exact(self) -> bool:
        return True

    @property
    def dtype(self) -> DTypeLike:
        return self.values.dtype

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        return {"codes": 0, "scales": 0, "exact": nbytes(self.values)}

    def append(
        self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"], visual: Visual = None
    ) -> "Dense":
        return self.replace(values=write(self.values, new, positions(starts, counts, new.shape[2], self.capacity)))

    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]:
        return self.values.astype(jnp.float32)

    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]:
        """Nothing is rounded beyond the buffer's dtype, so both views of every position are the same."""
        return jnp.zeros((*ages.shape, self.capacity), bool)

    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> "Dense":
        return self.replace(values=jnp.where(within(kept, self.capacity), self.values, 0))
