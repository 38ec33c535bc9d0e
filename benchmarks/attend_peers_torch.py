"""Decode attention over a bfloat16 cache by torch: scaled_dot_product_attention's kernels and flex_attention.

Loaded by `python -m kernels.bench`, so that all run by turns in one process.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence

# The compiler's workers are forks, which threads of JAX in the same process do not survive.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernels.race.caches import Shape
from kernels.race.entrants import corners, relative_error, sets
from kernels.race.timing import Entrant

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of q (b, k, g, d) over keys and values (b, k, s, d): g query heads a kv head are as many queries."""


def _fused(backend: SDPBackend, shape: Shape, working_set: int) -> Entrant:
    """Returns one of scaled_dot_product_attention's kernels; raises RuntimeError where it does not run."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return _entrant(call, shape, working_set)


def _flex(shape: Shape, working_set: int) -> Entrant:
    """Returns compiled flex_attention, which knows grouped queries itself."""
    torch._dynamo.reset()  # after eight shapes it would silently run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        one = q.reshape(shape.batch, shape.heads, 1, shape.head_dim)
        return compiled(one, k, v, enable_gqa=shape.heads != shape.kv_heads).reshape(q.shape)

    return _entrant(call, shape, working_set)


PEERS: dict[str, Callable[[Shape, int], Entrant]] = {
    "torch-flash": functools.partial(_fused, SDPBackend.FLASH_ATTENTION),
    "torch-cudnn": functools.partial(_fused, SDPBackend.CUDNN_ATTENTION),
    "torch-efficient": functools.partial(_fused, SDPBackend.EFFICIENT_ATTENTION),
    "torch-flex": _flex,
}
"""Made for a shape and a working set in bytes; as in `kernels.race.entrants`."""


def release() -> None:
    """Gives the buffers back to the device, for JAX to have."""
    _layers.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def _entrant(call: Call, shape: Shape, working_set: int) -> Entrant:
    q, *layers = _layers(shape, sets(shape.nbytes, working_set))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why other kernels do not run, said before the error
        out = call(q[0], *layers[0])
    at = corners(shape.batch, shape.kv_heads)
    error = relative_error(*(x[at].float().cpu().numpy() for x in (out, q[0], *layers[0])))
    run, note = launcher(call, q[0], layers)
    return Entrant(run, lambda _: synchronize(), len(layers), shape.nbytes, error, note)


def launcher(call: Call, q: torch.Tensor, layers: Sequence[Sequence[torch.Tensor]]) -> tuple[Callable[[], None], str]:
    """Returns what calls on all layers, and how: as one CUDA graph, so that launches cost next to nothing."""

    @torch.inference_mode()
    def one_by_one() -> None:
        for layer in layers:
            call(q, *layer)

    one_by_one()
    if not torch.cuda.is_available():
        return one_by_one, "calls"
    synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # JAX's threads, idle now, are none of the graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            one_by_one()
        graph.replay()
        synchronize()
    except RuntimeError:
        return one_by_one, "calls"
    return graph.replay, "graph"


@functools.lru_cache(1)
def _layers(shape: Shape, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Returns the queries, alone, and the keys and values of so many layers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    queries = normal(shape.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    return [(queries,), *((normal(*shape.side), normal(*shape.side)) for _ in range(count))]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
