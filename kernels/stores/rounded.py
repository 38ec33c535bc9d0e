"""A store that computes what Packed would give back, with the bit-width as data: one program serves a search."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kernels import quantize
from kernels.quantize import Quantizer
from kernels.stores.base import Shape, Visual, check_geometry, nbytes, positions, settled, take, within, write


class Rounded(struct.PyTreeNode):
    """Values as Packed would give them back; 16 bits keep them exact. It has no ring: what is cropped stays rounded."""

    values: Float[Array, "b h s d"]
    bits: Int[Array, ""]
    quantizer: Quantizer = struct.field(pytree_node=False)
    window: int = struct.field(pytree_node=False)
    dtype: DTypeLike = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, shape: Shape, bits: int | Array, quantizer: Quantizer, window: int, dtype: DTypeLike) -> "Rounded":
        check_geometry(shape, quantizer, window)
        return cls(jnp.zeros(shape, jnp.float32), jnp.asarray(bits, jnp.int32), quantizer, window, dtype)

    @property
    def exact(self) -> bool:
        return False

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of these buffers, which are not those of a deployed cache."""
        return {"codes": 0, "scales": 0, "exact": nbytes(self.values, self.bits)}

    def append(
        self, new: Float[Array, "b h t d"], starts: Int[Array, "b"], counts: Int[Array, "b"], visual: Visual = None
    ) -> "Rounded":
        t, capacity, step = new.shape[2], self.capacity, self.quantizer.step
        held = new.astype(self.dtype).astype(jnp.float32)
        counts = jnp.minimum(counts, capacity - starts)
        values = write(self.values, held, positions(starts, counts, t, capacity))
        first = self._settled(starts)
        length = -(-t // step) * step
        at = positions(first, self._settled(starts + counts) - first, length, capacity)
        block = take(values, jnp.minimum(first[:, None] + jnp.arange(length), capacity - 1))
        return self.replace(values=write(values, quantize.round_groups(block, self.bits, self.quantizer), at))

    def read(self, lengths: Int[Array, "b"], visual: Visual = None) -> Float[Array, "b h s d"]:
        return self.values

    def rounded(self, ages: Int[Array, "b t"], visual: Visual = None) -> Bool[Array, "b t s"]:
        return jnp.arange(self.capacity) < self._settled(ages)[..., None]

    def crop(self, lengths: Int[Array, "b"], kept: Int[Array, "b"], visual: Visual = None) -> "Rounded":
        return self.replace(values=jnp.where(within(kept, self.capacity), self.values, 0))

    def _settled(self, lengths: Int[Array, "*b"]) -> Int[Array, "*b"]:
        return settled(lengths, self.quantizer, self.window)
