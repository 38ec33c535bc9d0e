"""A store that keeps every token in the buffer's own dtype."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels.stores.base import Shape, Visual, nbytes, positions, take, within, write


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
        t = new.shape[2]
        if 2 * t < self.capacity:
            return self.replace(values=write(self.values, new, positions(starts, counts, t, self.capacity)))
        # Most of the buffer is new: reading all of it costs a GPU less than a scatter.
        step = jnp.arange(self.capacity) - starts[:, None]
        own, is_new = take(new, step).astype(self.dtype), (step >= 0) & (step < counts[:, None])
        return self.replace(values=jnp.where(is_new[:, None, :, None], own, self.values))

    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]:
        return self.values.astype(jnp.float32)

    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]:
        """Nothing is rounded beyond the buffer's dtype, so both views of every position are the same."""
        return jnp.zeros((*ages.shape, self.capacity), bool)

    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> "Dense":
        return self.replace(values=jnp.where(within(kept, self.capacity), self.values, 0))
