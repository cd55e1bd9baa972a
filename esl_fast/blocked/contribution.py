"""Folding on a CPU without gradients: one product a level, straight into its place."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fold(units: Tensor, matrices: Sequence[Tensor], scales: Tensor, *, side: str) -> Tensor:
    """As :func:`esl_fast.reference.contribution.fold` for `units (n, U)`; the result is units-major like they are."""
    dims = [m.shape[0] for m in matrices]
    folded = units.new_empty(units.shape[1], units.shape[0])
    for part, out, matrix, scale in zip(units.mT.split(dims), folded.split(dims), matrices, scales, strict=True):
        torch.mm(scale * (matrix if side == "text" else matrix.mT), part, out=out)
    return folded.mT
