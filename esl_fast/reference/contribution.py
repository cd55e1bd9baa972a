"""Contribution degrees and their folding into one side of the similarity: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def degrees(w: Tensor, gate: Tensor, sharpness: Tensor) -> Tensor:
    """``degree_k = exp((|w_k| - threshold) * sharpness) * w_k``, ``w (L+1,)``; gradients flow through max and min.

    ``threshold = (max|w| - min|w|) * gate + min|w|``. Global variant: ``gate = sigmoid(temp_scale_1)``,
    ``sharpness = exp(temp_scale_2)``.
    """
    size = w.abs()
    low, high = size.amin(), size.amax()
    threshold = (high - low) * gate + low
    return torch.exp((size - threshold) * sharpness) * w


def fold(units: Tensor, matrices: Sequence[Tensor], scales: Tensor, *, side: str) -> Tensor:
    """Multiply each level of ``units (..., U)`` by ``scales[k] * D_k``.

    ``x^T D y`` is ``x . (D y)`` (``side="text"``) as well as ``(D^T x) . y`` (``side="image"``).
    """
    parts = units.split([m.shape[0] for m in matrices], dim=-1)
    levels = zip(parts, matrices, scales, strict=True)
    return torch.cat([scale * (part @ (m.mT if side == "text" else m)) for part, m, scale in levels], dim=-1)


def normed_matrix(table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """D_k of the region-word variant: LayerNorm over both axes of an embedding table, all ``(d_k, d_k)``."""
    if table.numel() == 1:  # its own mean; eps would make a gradient of what rounding leaves of the difference
        return bias + 0 * weight * table
    return torch.nn.functional.layer_norm(table, table.shape, weight, bias, eps=1e-8)
