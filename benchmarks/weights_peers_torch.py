"""Products with weight matrices by torch: cuBLAS in bfloat16, tinygemm's int4 and cuSPARSELt's 2:4.

Loaded by `python -m benchmarks.weights_gpu`, so that all run by turns in one process. What torch lacks here raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.attend_peers_torch import launcher, synchronize
from kernels.gpu.weights.cases import CHECKED
from kernels.race.entrants import sets
from kernels.race.timing import Entrant, Error

GROUP = 128
TILES = 8
"""tinygemm's inner tiles along the inputs: the most that it takes."""
_TORCH: Any = torch
"""For what its stubs do not name."""


def bfloat16(shape: tuple[int, int], m: int, working_set: int) -> Entrant:
    """Returns the plain product."""
    nbytes = 2 * shape[0] * shape[1]
    weights = [_normal(shape[1], shape[0]) for _ in range(sets(nbytes, working_set))]
    return _entrant(linear, _normal(m, shape[0]), [(w,) for w in weights], weights[0], nbytes)


def tinygemm(shape: tuple[int, int], m: int, working_set: int) -> Entrant:
    """Returns the product with int4 codes in groups of 128, scales and zeros in bfloat16."""
    _need_cuda()
    inputs, outputs = shape
    nbytes = inputs * outputs // 2 + 4 * outputs * inputs // GROUP
    drawn = [_int4(inputs, outputs) for _ in range(sets(nbytes, working_set))]
    packed = [
        (_TORCH._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], TILES), meta) for codes, meta in drawn
    ]
    codes, meta = drawn[0]
    scale, zero = (x.T.repeat_interleave(GROUP, 1)[:CHECKED].float() for x in meta.unbind(-1))
    dense = (codes[:CHECKED].float() - 8) * scale + zero

    def call(x: torch.Tensor, words: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        return _TORCH._weight_int4pack_mm(x, words, GROUP, meta)

    return _entrant(call, _normal(m, inputs), packed, dense, nbytes)


def cusparselt(shape: tuple[int, int], m: int, working_set: int) -> Entrant:
    """Returns the product with bfloat16 matrices of which two of every four inputs are kept."""
    _need_cuda()
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch has no cuSPARSELt")
    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    inputs, outputs = shape
    nbytes = inputs * outputs * 9 // 8
    keep = torch.tensor([True, True, False, False], device=_device()).repeat(inputs // 4)
    # The same two of all fours: what is read and computed does not depend on which.
    dense = _normal(outputs, inputs) * keep
    weights = [
        (to_sparse_semi_structured(_normal(outputs, inputs) * keep),) for _ in range(sets(nbytes, working_set) - 1)
    ]
    weights = [(to_sparse_semi_structured(dense),), *weights]
    return _entrant(linear, _normal(m, inputs), weights, dense, nbytes)


PEERS: dict[str, Callable[[tuple[int, int], int, int], Entrant]] = {
    "torch linear": bfloat16,
    "torch tinygemm": tinygemm,
    "torch cuSPARSELt": cusparselt,
}
"""Made for a shape (inputs, outputs), rows of x and a working set in bytes."""


@torch.inference_mode()
def _entrant(
    call: Callable[..., torch.Tensor], x: torch.Tensor, weights: Sequence[tuple[Any, ...]], dense: Any, nbytes: int
) -> Entrant:
    """Returns an entrant; `dense` are the first matrix's rows, at least those whose outputs are checked."""
    exact = _numbers(x) @ _numbers(dense[:CHECKED]).T
    error = Error.of(_numbers(call(x, *weights[0])[:, :CHECKED]), exact)
    run, note = launcher(call, x, weights)

    def wait(_: Any) -> None:
        # Holds x and the weights, which a captured graph knows only by their addresses.
        assert len(held[1]) == len(weights)
        synchronize()

    held = x, weights
    return Entrant(run, wait, len(weights), nbytes, error, note)


def _int4(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=_device())
    return codes, _normal(inputs // GROUP, outputs, 2) * 1e-3


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def _normal(*size: int) -> torch.Tensor:
    return torch.randn(size, device=_device(), dtype=torch.bfloat16)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA device")
