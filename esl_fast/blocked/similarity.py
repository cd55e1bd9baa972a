"""All-pairs similarity whose larger side is made block by block, on a CPU without gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

# Items at a time: their units stay in the cache until they are multiplied, and no large buffer is touched first.
BLOCK = 1700


def similarity(folded: Tensor, features: Tensor, units: Callable[[Tensor], Tensor], *, folded_side: str) -> Tensor:
    """`folded @ units(features)^T` or, where texts are folded, its transpose: images by texts either way."""
    n, m = folded.shape[0], features.shape[0]
    scores = folded.new_empty((n, m) if folded_side == "image" else (m, n))
    size = -(-m // max(1, -(-m // BLOCK)))
    size = -(-size // 16) * 16 or 1  # whole vectors
    columns = (scores if folded_side == "image" else scores.mT).split(size, 1)
    for block, out in zip(features.split(size), columns, strict=True):
        torch.mm(folded, units(block).mT, out=out)
    return scores
