"""Best matches of each query over a gallery of any size, a block of the gallery at a time."""

import torch
from torch import Tensor

# Scores, and entries of the gallery, held at a time.
BLOCK_ELEMENTS = 1 << 24


class Best:
    """The ``k`` best of ``gallery`` items for each query, from blocks of their scores in ascending order of items.

    Of equal scores the lower index comes first; NaN counts as -inf.
    """

    def __init__(self, queries: int, gallery: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        k = min(k, gallery)
        self.values = torch.full((queries, k), -torch.inf, dtype=dtype, device=device)
        self.indices = torch.full((queries, k), gallery, device=device)  # no item's: an item of -inf comes before it

    def update(self, queries: slice, first: int, scores: Tensor) -> None:
        """Take in the scores of some queries and the items from ``first`` on, whose NaN are overwritten."""
        k = self.values.shape[1]
        best, where = stable_topk(lowest_where_nan(scores), min(k, scores.shape[1]))
        best, where = torch.cat([self.values[queries], best], 1), torch.cat([self.indices[queries], where + first], 1)
        if first < k:  # a place that no item has taken comes after items of -inf
            where, order = where.sort(dim=1)
            best = best.gather(1, order)
        best, second = best.sort(dim=1, descending=True, stable=True)
        self.values[queries], self.indices[queries] = best[:, :k], where.gather(1, second)[:, :k]


def lowest_where_nan(scores: Tensor) -> Tensor:
    """In place."""
    return scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`esl_fast.reference.topk.topk` of ``queries (Q, U) @ gallery (G, U)^T``; blocks move to the queries'
    device and to float32 (or float64) as they come, so that the gallery may be memory-mapped or of lower precision.
    """
    compute = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    queries = queries.to(compute)
    best = Best(len(queries), len(gallery), k, compute, queries.device)
    size = max(1, BLOCK_ELEMENTS // max(*queries.shape, 1))
    for first in range(0, len(gallery), size):
        block = gallery[first : first + size].to(queries.device, compute)
        best.update(slice(None), first, queries @ block.mT)
    return best.values, best.indices


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, descending, lower columns first among equals.

    ``torch.topk`` breaks ties as it likes: those above the k-th score are all in, of those equal to it the lowest
    columns are taken.
    """
    # Looking for ties would wait for a GPU, and a compiler cannot.
    if scores.is_cuda or torch.compiler.is_compiling():
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    values, indices = scores.topk(k, dim=1)
    if k == 0:
        return values, indices
    last = values[:, -1:]
    tied = (scores == last).sum(1) > (values == last).sum(1)
    rows = tied.nonzero().flatten()
    if len(rows):
        exact = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = exact.values[:, :k], exact.indices[:, :k]
    # Two stable sorts: by column, then by score.
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)
