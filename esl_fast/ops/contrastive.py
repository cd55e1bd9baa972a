"""Symmetric InfoNCE without the matrix."""

import torch
from torch import Tensor

from esl_fast import blocked, reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_transformed
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels

SAME_OWNER = ("positive", "ignore", "negative")


@without_autocast
def contrastive_loss(
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_owner: str = "positive",
) -> Tensor:
    """Mean of the two mean cross-entropies of ``logit_scale * image_units @ folded_text_units^T``, rows and columns.

    The ``(N, M)`` matrix is never held: forward streams it in tiles, backward computes them again. Gradients reach
    both units and ``logit_scale``.

    Args:
        image_units: ``(N, U)``.
        folded_text_units: ``(M, U)``; either side may be the folded one.
        logit_scale: the temperature's inverse itself (not its logarithm), one value.
        image_ids, text_ids: ``(N,)`` and ``(M,)`` integers, which image each row and column belongs to. Without them
            N = M and the diagonal is positive.
        same_owner: what a pair of equal ids is: ``"positive"`` (the target is uniform over a query's positives; a
            query without any is left out), ``"ignore"`` (off the diagonal, left out of the denominators) or
            ``"negative"`` (off the diagonal).

    Returns:
        The loss, a scalar in float32 (or float64).

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes or devices, an empty batch.
    """
    checks.matrix("image_units", image_units)
    checks.matrix("folded_text_units", folded_text_units, image_units.shape[1])
    checks.same_device(image_units=image_units, folded_text_units=folded_text_units)
    n, m = image_units.shape[0], folded_text_units.shape[0]
    checks.one_of("same_owner", same_owner, SAME_OWNER)
    checks.ids_of(image_ids, text_ids, n, m, image_units.device)
    if n == 0 or m == 0:
        raise ValueError(f"a contrastive loss needs pairs; given {n} images and {m} texts")
    if n != m and (image_ids is None or same_owner != "positive"):
        raise ValueError(f"{n} images and {m} texts have no diagonal; give image_ids and text_ids as positives")
    compute = torch.promote_types(torch.promote_types(image_units.dtype, folded_text_units.dtype), torch.float32)
    scale = checks.scalar("logit_scale", logit_scale, compute, image_units.device)
    if use_kernels(image_units, folded_text_units):
        from esl_fast.kernels import contrastive as kernel  # Triton is imported only where it is used

        common = torch.promote_types(image_units.dtype, folded_text_units.dtype)
        return kernel.contrastive_loss(
            image_units.to(common), folded_text_units.to(common), scale, image_ids, text_ids, same_owner
        )
    if is_transformed():
        scores = image_units.to(compute) @ folded_text_units.to(compute).mT
        return reference.contrastive.contrastive_loss(scores, scale, image_ids, text_ids, same_owner)
    return blocked.contrastive.contrastive_loss(
        image_units.to(compute), folded_text_units.to(compute), scale, image_ids, text_ids, same_owner
    )
