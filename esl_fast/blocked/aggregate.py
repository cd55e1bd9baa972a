"""Measure-units on a CPU without gradients, vectorised over the batch.

Units are kept *units-major*: `(U, n)` in memory, handed out as its `(n, U)` transpose. A level then is a
block of contiguous rows, a pair of neighbouring units two rows, and every filter tap, sparse product, norm and
scale a long unit-stride loop; the matrix product that follows takes either layout at the same speed.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from esl_fast.reference.aggregate import EPS

# Vectors handled at a time: a level and its temporaries stay in the cache.
BLOCK = 2048
# Share of kept entries beyond which a dense product is faster; only ties go beyond two entries a row.
DENSE = 1 / 20


def compressed(matrix: Tensor) -> Tensor:
    """A selected matrix `(d_l, d_{l-1})` as its kept entries alone (CSR); the matrix itself if they are many."""
    if matrix.count_nonzero() > DENSE * matrix.numel():
        return matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls CSR tensors a beta feature, once a process
        return matrix.to_sparse_csr()


def _next_level(z: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out (d_l, n)` from `z (d_{l-1}, n)`."""
    if weight.ndim == 2:
        torch.mm(weight, z, out=out)
        return
    first, *others = weight.tolist()  # scaling by a number is faster than by a tensor
    s, end = weight.numel(), out.shape[0] * weight.numel()
    torch.mul(z[0:end:s], first, out=out)
    for t, tap in enumerate(others, start=1):
        out.add_(z[t:end:s], alpha=tap)


def aggregate(x: Tensor, weights: Sequence[Tensor], *, chain: str, normalize: bool) -> Tensor:
    """As :func:`esl_fast.reference.aggregate.aggregate` for `x (n, d)`, float32 or float64, without autograd.

    Selected matrices may be :func:`compressed`.
    """
    n, d = x.shape
    dims = [d]
    for weight in weights:
        dims.append(dims[-1] // weight.numel() if weight.ndim == 1 else weight.shape[0])
    units = x.new_empty(sum(dims), n)
    for start in range(0, n, BLOCK):
        rows = x[start : start + BLOCK]
        levels = units[:, start : start + BLOCK].split(dims)
        _transposed(rows, normalize, out=levels[0])
        for previous, level, weight in zip(levels, levels[1:], weights, strict=False):
            _next_level(previous, weight, out=level)
            if chain == "normalized":
                _l2norm_(level)
        if chain == "raw":
            for level in levels[1:]:
                _l2norm_(level)
    return units.mT


def _transposed(rows: Tensor, normalize: bool, out: Tensor) -> None:
    """`out (d, n)` from `rows (n, d)`, divided by their norms if wanted.

    By way of rows an odd number of cache lines apart: at a power of two, as d mostly is, a column of them falls into
    a few sets of the cache, and transposing takes three times as long.
    """
    n, d = rows.shape
    spread = rows.new_empty(n, 32 * (d // 32) + 48)[:, :d]
    if normalize:
        torch.mul(rows, torch.linalg.vector_norm(rows, dim=1, keepdim=True).reciprocal_(), out=spread)
    else:
        spread.copy_(rows)
    out.copy_(spread.mT)


def _l2norm_(z: Tensor) -> None:
    """In place, over the first axis."""
    z.div_(z.square().sum(0).sqrt_().add_(EPS))
