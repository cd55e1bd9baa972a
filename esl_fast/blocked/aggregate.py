"""Measure-units on a CPU without gradients, vectorised over the batch.

Units are kept *units-major*: `(U, n)` in memory, handed out as its `(n, U)` transpose. A level then is a
block of contiguous rows, a pair of neighbouring units two rows, and every filter tap, gather, norm and scale
a long unit-stride loop; the matrix product that follows takes either layout at the same speed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esl_fast.reference.aggregate import EPS

# Vectors handled at a time: a level and its temporaries stay in the cache.
BLOCK = 2048


# Kept entries a row beyond which a dense product is faster than gathering them; only ties go beyond two.
MOST_GATHERED = 8


class SparseRows(NamedTuple):
    """A selected matrix `(d_l, d_{l-1})` by its kept entries: row i is `sum_t values[t, i] * e_{columns[t, i]}`."""

    columns: Tensor  # (K, d_l) int64
    values: Tensor  # (K, d_l)


def sparse_rows(matrix: Tensor) -> SparseRows | Tensor:
    """Kept entries of a selected matrix, K the largest number in a row; the matrix itself if ties make them many."""
    kept = matrix != 0
    count = int(kept.sum(-1).max()) if matrix.numel() else 0
    if count > MOST_GATHERED:
        return matrix
    columns = kept.to(torch.uint8).topk(max(count, 1), dim=-1).indices
    return SparseRows(columns.T.contiguous(), matrix.gather(-1, columns).T.contiguous())


def _next_level(z: Tensor, weight: Tensor | SparseRows, out: Tensor) -> None:
    """`out (d_l, n)` from `z (d_{l-1}, n)`."""
    if isinstance(weight, Tensor) and weight.ndim == 2:
        torch.mm(weight, z, out=out)
        return
    if isinstance(weight, SparseRows):
        rows = ((z.index_select(0, c), v.unsqueeze(-1)) for c, v in zip(*weight, strict=True))
    else:
        s = weight.numel()
        windows = z[: out.shape[0] * s].unflatten(0, (-1, s))
        rows = ((windows[:, t], weight[t]) for t in range(s))
    first, factor = next(rows)
    torch.mul(first, factor, out=out)
    for row, factor in rows:
        out.addcmul_(row, factor)


def aggregate(x: Tensor, weights: Sequence[Tensor | SparseRows], *, chain: str, normalize: bool) -> Tensor:
    """As :func:`esl_fast.reference.aggregate.aggregate` for `x (n, d)`, float32 or float64, without autograd."""
    n, d = x.shape
    dims = [d]
    for weight in weights:
        dims.append(_level_size(weight, dims[-1]))
    units = x.new_empty(sum(dims), n)
    for start in range(0, n, BLOCK):
        rows = x[start : start + BLOCK]
        levels = units[:, start : start + BLOCK].split(dims)
        columns = rows.mT.contiguous()  # torch transposes much faster into contiguous memory than into a view
        if normalize:
            torch.mul(columns, torch.linalg.vector_norm(rows, dim=1).reciprocal_(), out=levels[0])
        else:
            levels[0].copy_(columns)
        for previous, level, weight in zip(levels, levels[1:], weights, strict=False):
            _next_level(previous, weight, out=level)
            if chain == "normalized":
                _l2norm_(level)
        if chain == "raw":
            for level in levels[1:]:
                _l2norm_(level)
    return units.mT


def _level_size(weight: Tensor | SparseRows, previous: int) -> int:
    if isinstance(weight, SparseRows):
        return weight.columns.shape[1]
    return previous // weight.numel() if weight.ndim == 1 else weight.shape[0]


def _l2norm_(z: Tensor) -> None:
    """In place, over the first axis."""
    z.mul_(z.square().sum(0).sqrt_().add_(EPS).reciprocal_())
