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
# Of these, vectors transposed at a time.
TRANSPOSED = 420
# Share of kept entries beyond which a dense product is faster: rows of fewer than 40 entries, and many ties.
DENSE = 1 / 20


def compressed(matrix: Tensor) -> Tensor:
    """A selected matrix `(d_l, d_{l-1})` as its kept entries alone (CSR); the matrix itself if they are many."""
    if matrix.count_nonzero() > DENSE * matrix.numel():
        return matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls CSR tensors a beta feature, once a process
        return matrix.to_sparse_csr()


def _next_level(z: Tensor, weight: Tensor, out: Tensor) -> float:
    """`out (d_l, n)` from `z (d_{l-1}, n)`, but for a factor, which is returned: only norms ever ask for it."""
    if weight.ndim == 2:
        torch.mm(weight, z, out=out)
        return 1.0
    taps = weight.tolist()  # scaling by a number is faster than by a tensor
    s, end = len(taps), out.shape[0] * len(taps)
    # With a largest tap of 1, two entries of a window take one pass.
    largest, *others = sorted(range(s), key=lambda t: -abs(taps[t]))
    factor = taps[largest]
    if not others or factor == 0:
        torch.mul(z[largest:end:s], factor, out=out)
        return 1.0
    summed = z[largest:end:s]
    for t in others:
        summed = torch.add(summed, z[t:end:s], alpha=taps[t] / factor, out=out)
    return factor


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
        factor, factors = 1.0, []
        for previous, level, weight in zip(levels, levels[1:], weights, strict=False):
            factor *= _next_level(previous, weight, out=level)
            if chain == "normalized":
                _l2norm_(level, factor)
                factor = 1.0
            else:
                factors.append(factor)
        for level, factor in zip(levels[1:], factors, strict=False):
            _l2norm_(level, factor)
    return units.mT


def spread_rows(x: Tensor) -> Tensor:
    """Room for a copy of `x (n, d)`, rows an odd number of cache lines apart.

    At a power of two, as d mostly is, a column falls into a few sets of the cache: transposing takes three times as
    long, and a matrix product, now and then, a tenth more.
    """
    n, d = x.shape
    return x.new_empty(n, 32 * (d // 32) + 48)[:, :d]


def _transposed(rows: Tensor, normalize: bool, out: Tensor) -> None:
    """`out (d, n)` from `rows (n, d)`, divided by their norms if wanted."""
    spread = spread_rows(rows[:TRANSPOSED])
    for some, columns in zip(rows.split(TRANSPOSED), out.split(TRANSPOSED, 1), strict=True):
        scaled = spread[: len(some)]
        if normalize:
            torch.mul(some, torch.linalg.vector_norm(some, dim=1, keepdim=True).reciprocal_(), out=scaled)
        else:
            scaled.copy_(some)
        columns.copy_(scaled.mT)


def _l2norm_(z: Tensor, factor: float) -> None:
    """`factor * z` over its norm along the first axis, in place."""
    norms = z.square().sum(0).sqrt_().add_(EPS / max(abs(factor), 1e-300))
    z.div_(norms if factor > 0 else norms.neg_())
