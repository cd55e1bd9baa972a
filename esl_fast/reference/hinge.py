"""Hinge ranking loss: the definition, from the whole matrix (any float dtype, differentiable)."""

import torch
from torch import Tensor


def hinge_loss(
    similarity: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = False,
) -> Tensor:
    """Sum over the batch of ``max(0, margin + s_negative - s_positive)`` for ``similarity (N, N)``, both ways.

    The diagonal is positive; the negatives of a positive are the other entries of its row and of its column, less
    those of equal ids ``(N,)`` if given. ``hardest`` counts one negative a row and one a column, the highest.
    """
    positive = similarity.diagonal()
    excluded = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if image_ids is not None:
        excluded = excluded | (image_ids[:, None] == text_ids)
    captions = (margin + similarity - positive[:, None]).relu().masked_fill(excluded, 0)
    images = (margin + similarity - positive).relu().masked_fill(excluded, 0)
    if hardest and len(similarity):
        captions, images = captions.max(1).values, images.max(0).values
    return captions.sum() + images.sum()
