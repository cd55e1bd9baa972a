"""Best matches of each query."""

import torch
from torch import Tensor

from esl_fast import blocked
from esl_fast.ops import checks


@torch.no_grad()
def topk(query_units: Tensor, gallery_units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices of the ``k`` best gallery items of each query, best first, without the matrix.

    Args:
        query_units: ``(Q, U)``.
        gallery_units: ``(G, U)``, one side folded; may lie on the CPU (pinned or memory-mapped) while the queries are
            on a GPU, it is then streamed.
        k: how many; all of them if the gallery is smaller.

    Returns:
        scores ``(Q, min(k, G))`` in float32 (or float64) and indices, int64, descending; of equal scores the lower
        index comes first, NaN counts as -inf.
    """
    checks.matrix("query_units", query_units)
    checks.matrix("gallery_units", gallery_units, query_units.shape[1])
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; expected a positive integer")
    return blocked.topk.topk(query_units, gallery_units, k)
