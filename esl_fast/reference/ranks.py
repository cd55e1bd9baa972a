"""Ranks of the best positive, both ways: the definition, from the whole matrix."""

import torch
from torch import Tensor


def retrieval_ranks(similarity: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of image-to-text ``(N,)`` and text-to-image ``(M,)`` for ``similarity (N, M)``.

    The rank of an item is the number of *other* items that score at least as high: a tie counts against
    the model. An image's rank is the best among its captions, ``owners (M,)`` names each caption's image.
    """
    n, m = similarity.shape
    caption = torch.arange(m, device=similarity.device)
    positive = similarity[owners, caption]  # (M,)
    text_to_image = (similarity >= positive).sum(0) - 1
    # (M,): among the captions of its own image's row, how many reach this caption
    per_caption = torch.stack([(similarity[i] >= s).sum() for i, s in zip(owners, positive, strict=True)]) - 1
    image_to_text = torch.full((n,), m, device=similarity.device).scatter_reduce(0, owners, per_caption, "amin")
    return image_to_text, text_to_image
