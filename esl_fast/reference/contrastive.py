"""Symmetric InfoNCE with owners: the definition, from the whole matrix (any float dtype, differentiable)."""

import torch
from torch import Tensor


def contrastive_loss(
    similarity: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_owner: str = "positive",
) -> Tensor:
    """Mean of the two mean cross-entropies of ``logit_scale * similarity (N, M)``, over rows and over columns.

    Without ids, or with ``same_owner="negative"``, the diagonal is positive (N = M). With ids ``(N,)`` and ``(M,)``:

    - ``"positive"``: every pair of equal ids is positive; the target of a row or column is uniform over its
      positives, ``lse - mean of the positive logits`` (SupCon's L_out). One without positives is left out of the mean.
    - ``"ignore"``: the diagonal is positive (N = M), other pairs of equal ids are left out of the denominators.
    """
    logits = logit_scale * similarity
    positive = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    if image_ids is not None and same_owner != "negative":
        same = image_ids[:, None] == text_ids[None, :]
        if same_owner == "ignore":
            logits = logits.masked_fill(same & ~positive, -torch.inf)
        else:
            positive = same

    def side(logits: Tensor, positive: Tensor) -> Tensor:
        count = positive.sum(1)
        mean_positive = torch.where(positive, logits, 0).sum(1) / count.clamp(min=1)
        losses = torch.where(count > 0, logits.logsumexp(1) - mean_positive, 0)
        return losses.sum() / (count > 0).sum().clamp(min=1)

    return (side(logits, positive) + side(logits.mT, positive.mT)) / 2
