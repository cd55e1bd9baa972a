"""Folding on a CPU without gradients: one product a level, straight into its place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esl_fast.blocked.aggregate import spread_rows


def fold(units: Tensor, matrices: Sequence[Tensor], scales: Tensor, *, side: str) -> Tensor:
    """As :func:`esl_fast.reference.contribution.fold` for `units (n, U)`."""
    dims = [m.shape[0] for m in matrices]
    folded = spread_rows(units, units.shape[1])
    parts, outs = units.split_with_sizes(dims, 1), folded.split_with_sizes(dims, 1)
    for part, out, matrix, scale in zip(parts, outs, matrices, scales.tolist(), strict=True):
        torch.addmm(out, part, matrix.mT if side == "text" else matrix, beta=0, alpha=scale, out=out)
    return folded
