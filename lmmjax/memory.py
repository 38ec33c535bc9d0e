"""What the weights and the KV cache take, to the byte, from shapes alone: known before anything is loaded."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from kernels.stores import Store
from kernels.weights import Matrix
from lmmjax.cache import cache_bytes
from lmmjax.config import LlavaConfig
from lmmjax.errors import InputError
from lmmjax.llava import Params, shapes
from lmmjax.plan import LayerPlan, Plan, uniform
from lmmjax.planned import planned_cache


@dataclasses.dataclass(frozen=True)
class SideMemory:
    """Bytes of the keys, or of the values, of one layer: codes; scales and zeros; tokens in full precision."""

    codes: int
    scales: int
    exact: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.exact

    def __add__(self, other: "SideMemory") -> "SideMemory":
        return SideMemory(self.codes + other.codes, self.scales + other.scales, self.exact + other.exact)


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """Bytes of one decoder layer's weights, keys and values, and the widths of these: of text, and of images."""

    weights: int
    key_bits: tuple[int, int]
    value_bits: tuple[int, int]
    keys: SideMemory
    values: SideMemory

    @property
    def kv(self) -> SideMemory:
        return self.keys + self.values


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of the weights and of the KV cache of `batch` rows, which `context` tokens each were asked for.

    A row has room for `capacity` tokens: whole groups, and whole buckets where the engine makes the cache; `images`
    of them are kept apart for image tokens. `parts` are the weights outside of the decoder's layers, by their names
    in the checkpoint. `kv_dense` is a cache of the same capacity with nothing quantized, `elements` how many numbers
    it holds. Pruned weights are zeros in buffers of their full size, and counted so, unless they are packed: these are
    counted as they lie, and `weights_dtypes` names their formats.
    """

    batch: int
    context: int
    capacity: int
    images: int
    weights_dtypes: tuple[str, ...]
    exact_dtype: str
    parts: Mapping[str, int]
    layers: tuple[LayerMemory, ...]
    kv_dense: int
    elements: int

    @property
    def weights(self) -> int:
        return sum(self.parts.values()) + sum(layer.weights for layer in self.layers)

    @property
    def step_weights(self) -> int:
        """Bytes of the weights that one decode step reads; of an embedding that is no head too, it reads a row."""
        head = self.parts.get("text.lm_head", self.parts["text.embedding"])
        return head + self.parts["text.norm"] + sum(layer.weights for layer in self.layers)

    @property
    def kv(self) -> SideMemory:
        return functools.reduce(SideMemory.__add__, (layer.kv for layer in self.layers))

    @property
    def total(self) -> int:
        return self.weights + self.kv.total

    @property
    def bits_per_element(self) -> float:
        """All of the cache's bits, scales and exact tokens too, for each number that it has room for."""
        return 8 * self.kv.total / self.elements

    def tokens_where_kv_is(self, share: int, dense: bool = False) -> int:
        """Returns at how many cached tokens, batch x context, the KV is one part in `share` of all bytes.

        2 is where it equals the weights. More rows like this report's are meant: a row's exact tokens weigh more
        the shorter it is. `dense` asks for the cache without a plan's widths.
        """
        kv = self.kv_dense if dense else self.kv.total
        return -(-self.weights * self.batch * self.capacity // ((share - 1) * kv))

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields and what follows from them, ready for JSON."""
        layers = [
            {**dataclasses.asdict(layer), "kv": {**dataclasses.asdict(layer.kv), "total": layer.kv.total}}
            for layer in self.layers
        ]
        return {
            **dataclasses.asdict(self),
            "layers": layers,
            "weights": self.weights,
            "step_weights": self.step_weights,
            "kv": {**dataclasses.asdict(self.kv), "total": self.kv.total},
            "total": self.total,
            "bits_per_element": self.bits_per_element,
            "tokens_where_kv_equals_weights": self.tokens_where_kv_is(2),
            "tokens_where_dense_kv_equals_weights": self.tokens_where_kv_is(2, dense=True),
            "tokens_where_kv_is_a_tenth": self.tokens_where_kv_is(10),
            "tokens_where_dense_kv_is_a_tenth": self.tokens_where_kv_is(10, dense=True),
        }


def memory_report(
    config: LlavaConfig,
    plan: Plan | None,
    batch: int,
    context: int,
    dtype: str = "bfloat16",
    *,
    params: Params | None = None,
    capacity: int | None = None,
    images: int = 0,
) -> MemoryReport:
    """Returns what the weights, and a cache of `batch` rows of `context` tokens, take. Makes no array.

    Args:
        config: the model's.
        plan: its cache formats; None is a dense cache in the weights' dtype.
        batch, context: rows, and tokens in each.
        dtype: of the weights, if there are no `params`.
        params: a model's weights or their shapes, such as `checkpoint.outline` reads, which then are counted.
        capacity: what the cache is made for, if more than `context`: see `engine.cache_capacity`.
        images: how many of a row's tokens are image tokens; matters to plans that keep these apart.

    Raises:
        InputError: the plan does not fit the model, or a number is out of range.
    """
    if min(batch, context) < 1 or not 0 <= images <= context:
        raise InputError(
            f"memory: got batch {batch}, context {context}, images {images}; expected at least 1, 1, and 0 to context"
        )
    text, params = config.text, shapes(config, dtype) if params is None else params
    images = images if plan and plan.splits_images else 0
    cache = planned_cache(config, params, plan and plan.check(text), batch, capacity or context, images)
    layers = tuple(
        _layer(layer, params["text"][f"layers_{i}"], *stores)
        for i, (layer, stores) in enumerate(zip((plan or uniform(text)).layers, cache.layers, strict=True))
    )
    dense = uniform(text, cache=plan.cache) if plan else None
    return MemoryReport(
        batch=batch,
        context=context,
        capacity=cache.capacity,
        images=images,
        weights_dtypes=_dtypes(params),
        exact_dtype=str(cache.layers[0][0].dtype),
        parts=_parts(params),
        layers=layers,
        kv_dense=cache_bytes(text, dense, batch, cache.capacity) if dense else cache.nbytes,
        elements=2 * text.layers * batch * text.kv_heads * cache.capacity * text.head_dim,
    )


def _layer(plan: LayerPlan, params: Params, keys: Store, values: Store) -> LayerMemory:
    return LayerMemory(
        weights=_nbytes(params),
        key_bits=plan.widths("keys"),
        value_bits=plan.widths("values"),
        keys=SideMemory(**keys.sizes),
        values=SideMemory(**values.sizes),
    )


def _parts(params: Params) -> dict[str, int]:
    text = {f"text.{name}": leaf for name, leaf in params["text"].items() if not name.startswith("layers_")}
    outer = {name: leaf for name, leaf in params.items() if name != "text"}
    return {name: _nbytes(tree) for name, tree in {**outer, **text}.items()}


def _dtypes(params: Params) -> tuple[str, ...]:
    """Returns the dtypes of plain leaves, and the formats of packed ones."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Matrix))
    named = {f"{leaf.kind} {leaf.bits} bits" if isinstance(leaf, Matrix) else str(leaf.dtype) for leaf in leaves}
    return tuple(sorted(named))


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
