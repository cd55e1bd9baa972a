"""Best matches of each query over a gallery of any size, a block of the gallery at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores held at a time.
BLOCK_ELEMENTS = 1 << 24


def topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`esl_fast.reference.topk.topk` of ``queries (Q, U) @ gallery (G, U)^T``; blocks move to the queries'
    device and to float32 (or float64) as they come, so that the gallery may be memory-mapped or of lower precision.
    """
    compute = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    queries = queries.to(compute)
    k = min(k, gallery.shape[0])
    values = queries.new_empty(queries.shape[0], 0)
    indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=queries.device)
    for start, block in _blocks(gallery, max(1, BLOCK_ELEMENTS // max(queries.shape[0], 1))):
        scores = queries @ block.to(queries.device, compute).mT
        scores = scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best, where = stable_topk(scores, min(k, scores.shape[1]))
        # Earlier blocks come first, so that of equal scores the lower index stays in front.
        values, indices = torch.cat([values, best], 1), torch.cat([indices, where + start], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values, indices = values.gather(1, order), indices.gather(1, order)
    return values, indices


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


def _blocks(gallery: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, gallery.shape[0], size):
        yield start, gallery[start : start + size]
