"""Wanda, SparseGPT and ADMM in torch, written to the papers and organised as their released code: weights (out, in).

What the releases do carelessly is done as lmmjax does it, so that both end with the same weights: masks have exact
counts, and ADMM's grows by its cubic schedule over the whole matrix.
"""

import torch
from torch import Tensor

BLOCK = 128

Pattern = tuple[int, int]


@torch.inference_mode()
def wanda(weight: Tensor, x_sq: Tensor, drop: int) -> Tensor:
    """Returns weights without the `drop` lowest of each output. Source: arXiv:2306.11695, algorithm 1."""
    score = weight.abs() * x_sq.sqrt()
    return weight.scatter(1, torch.sort(score, dim=1, stable=True).indices[:, :drop], 0)


@torch.inference_mode()
def sparsegpt(weight: Tensor, gram: Tensor, drop: int, pattern: Pattern | None = None) -> Tensor:
    """Returns weights without `drop` times the outputs, or by a pattern. Source: arXiv:2301.00774, algorithm 1."""
    left, pruned, upper = weight.clone(), torch.zeros_like(weight), _upper(gram)
    outputs, inputs = weight.shape
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        count = drop * outputs * end // inputs - drop * outputs * start // inputs
        rows, errors = _block(left[:, start:end].clone(), upper[start:end, start:end], count, pattern)
        pruned[:, start:end] = rows
        left[:, end:] -= errors @ upper[start:end, end:]
    return pruned


@torch.inference_mode()
def admm(weight: Tensor, gram: Tensor, drop: int, pattern: Pattern | None = None) -> Tensor:
    """Returns weights without `drop` times the outputs, or by a pattern. Source: arXiv:2401.02938, algorithm 2."""
    norm = gram.diagonal().sqrt()
    w = (weight * norm).T.contiguous()
    xx = gram / norm / norm[:, None]
    diagonal = xx.diagonal()
    diagonal += 0.1 * diagonal.mean()
    xy, u = xx @ w, torch.zeros_like(w)
    diagonal += 1
    inverse = torch.linalg.inv(xx)
    total, keep = drop * w.shape[1], torch.ones_like(w, dtype=torch.bool)
    for turn in range(1, 21):
        if turn <= 15:
            keep = _grown((w + u).abs(), total * (15**3 - (15 - turn) ** 3) // 15**3, pattern)
        z = (w + u) * keep
        u += w - z
        w = inverse @ (xy + z - u)
    return (((w + u) * keep).T / norm).contiguous()


def _upper(gram: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of H^-1."""
    hessian = 2 * gram
    diagonal = hessian.diagonal()
    diagonal += 0.01 * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def _block(rows: Tensor, upper: Tensor, count: int, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """Returns a block's weights after the turn of each input, and what later blocks have to make up for."""
    diagonal, errors = upper.diagonal(), torch.zeros_like(rows)
    keep = torch.ones_like(rows, dtype=torch.bool)
    if pattern is None:
        keep = _above(rows**2 / diagonal**2, count)
    for i in range(rows.shape[1]):
        if pattern is not None and i % pattern[1] == 0:
            n, m = pattern
            score = rows[:, i : i + m] ** 2 / diagonal[i : i + m] ** 2
            keep.scatter_(1, i + torch.topk(score, m - n, dim=1, largest=False).indices, False)
        errors[:, i] = torch.where(keep[:, i], 0, rows[:, i]) / diagonal[i]
        rows[:, i:] -= errors[:, i : i + 1] * upper[i : i + 1, i:]
    return rows * keep, errors


def _grown(size: Tensor, count: int, pattern: Pattern | None) -> Tensor:
    """Returns ADMM's mask of a round; a pattern's N highest of each M inputs are safe."""
    if pattern is not None:
        n, m = pattern
        groups = size.view(-1, m, size.shape[1])
        size = groups.scatter(1, torch.topk(groups, n, dim=1).indices, torch.inf).view(size.shape)
    return _above(size, count)


def _above(score: Tensor, count: int) -> Tensor:
    """Returns which are above the `count` lowest: by one selection, which is faster than the releases' sorts."""
    if not count:
        return torch.ones_like(score, dtype=torch.bool)
    return score > torch.kthvalue(score.flatten(), count).values
