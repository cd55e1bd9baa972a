"""All-pairs similarity of units: the definition, level by level, and its folded form."""

from collections.abc import Sequence

from torch import Tensor


def similarity_by_level(image_units: Tensor, text_units: Tensor, matrices: Sequence[Tensor], degrees: Tensor) -> Tensor:
    """``S[i, j] = (1 / (L+1)) * sum_k degree_k * x_k(i)^T D_k y_k(j)`` for units ``(N, U)`` and ``(M, U)``."""
    dims = [m.shape[0] for m in matrices]
    levels = zip(image_units.split(dims, -1), text_units.split(dims, -1), matrices, degrees, strict=True)
    return sum(degree * (x @ m @ y.mT) for x, y, m, degree in levels) / len(dims)


def similarity(image_units: Tensor, folded_text_units: Tensor) -> Tensor:
    """The same as one matrix product: ``(N, U) @ (M, U)^T``, one side folded."""
    return image_units @ folded_text_units.mT
