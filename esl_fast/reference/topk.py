"""Best matches of each query: the definition, from the whole matrix."""

import torch
from torch import Tensor


def topk(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest scores of each row of ``similarity (Q, G)``, descending, and their columns ``(Q, k)`` int64.

    Of equal scores the lower column comes first. NaN counts as -inf.
    """
    scores = torch.where(similarity.isnan(), -torch.inf, similarity)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]
