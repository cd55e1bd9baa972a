"""Hinge ranking loss, of a similarity matrix or of regions and words."""

import torch
from torch import Tensor

from esl_fast import blocked, reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_transformed
from esl_fast.ops import checks
from esl_fast.ops.region_word import check_region_word, region_word_similarity


def hinge_loss(
    similarity: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = False,
) -> Tensor:
    """Sum over the batch of ``max(0, margin + s_negative - s_positive)``: each image against captions, and back.

    Args:
        similarity: scores ``(N, N)`` of images and captions, any float dtype; the diagonal is positive.
        image_ids, text_ids: ``(N,)`` integers each, which image a row and a column belongs to: off the diagonal, pairs
            of equal ids are no negatives. Without them everything off the diagonal is one.
        margin: how far a negative must stay behind to cost nothing; one exactly so far has no gradient either.
        hardest: count only the highest negative of each row and of each column (of equal ones, one).

    Returns:
        The loss, a scalar in float32 (or float64), 0 for an empty batch. It is a sum, as in the official code, and
        grows with the batch.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; a matrix that is not square.
    """
    checks.matrix("similarity", similarity)
    n, m = similarity.shape
    if n != m:
        raise ValueError(f"similarity has shape ({n}, {m}); {n} images and {m} texts have no diagonal of positives")
    checks.ids_of(image_ids, text_ids, n, n, similarity.device)
    margin = checks.number("margin", margin)
    if is_transformed():
        similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        return reference.hinge.hinge_loss(similarity, image_ids, text_ids, margin=margin, hardest=hardest)
    return blocked.hinge.hinge_loss(similarity, image_ids, text_ids, margin, hardest)


@without_autocast
def region_word_hinge_loss(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    margin: float = 0.2,
    hardest: bool = False,
) -> Tensor:
    """:func:`hinge_loss` of :func:`region_word_similarity`, with less to differentiate where only the hardest count.

    Of the N^2 pairs at most 3 N then have a gradient: all are scored without one, and those are scored again. What
    remains costs one product instead of four.

    Args:
        region_units, word_units, smooth, word_lengths, region_lengths: as in :func:`region_word_similarity`, N = M.
        image_ids, text_ids, margin, hardest: as in :func:`hinge_loss`.

    Returns:
        The loss, a scalar in float32 (or float64); gradients reach both units and ``smooth``.

    Raises:
        TypeError, ValueError: as the two of them do.
    """
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths)
    inputs = (region_units, word_units, smooth, word_lengths, region_lengths)
    n, m = region_units.shape[0], word_units.shape[0]
    if n != m:
        raise ValueError(f"{n} images and {m} captions have no diagonal of positives")
    checks.ids_of(image_ids, text_ids, n, n, region_units.device)
    margin = checks.number("margin", margin)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (region_units, word_units, smooth))
    if not (hardest and grad and n) or is_transformed():
        return hinge_loss(region_word_similarity(*inputs), image_ids, text_ids, margin=margin, hardest=hardest)
    with torch.no_grad():
        found = blocked.hinge.hardest_negatives(region_word_similarity(*inputs), image_ids, text_ids)
    images, captions = found.pairs()
    scores = blocked.region_word_pairs.candidate_scores(*inputs, images, captions[:, None], "image")
    return blocked.hinge.hinge_of_hardest(scores[:, 0], found, margin)
