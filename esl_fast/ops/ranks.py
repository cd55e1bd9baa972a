"""Ranks of the right answer, both ways, without the matrix."""

import torch
from torch import Tensor

from esl_fast import blocked
from esl_fast._autocast import without_autocast
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels


@torch.no_grad()
@without_autocast
def retrieval_ranks(image_units: Tensor, folded_text_units: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Rank (from 0) of each image's best caption among all captions, and of each caption's image among all images.

    A rank is the number of *other* items that score at least as high as the right one: a tie counts against the
    model. An image without captions ranks M. On a CPU, where images own unequally many captions, copies of a caption
    may differ in the last bits of their scores and then do not tie.

    Args:
        image_units: ``(N, U)``.
        folded_text_units: ``(M, U)``; scores are their dot products (either side may be the folded one).
        owners: ``(M,)`` integers, the image index of each caption, in any order.

    Returns:
        image-to-text ranks ``(N,)`` and text-to-image ranks ``(M,)``, int64.

    Raises:
        TypeError, ValueError: wrong types, shapes or owners, or (CPU) non-finite units, naming the rows. On a GPU,
            where looking would mean waiting, NaN counts as reaching whatever it is compared with, and an item whose
            right answer has a score that is not finite, or an owner that is no image, ranks last: what is broken does
            not pass for good.
    """
    checks.matrix("image_units", image_units)
    checks.matrix("folded_text_units", folded_text_units, image_units.shape[1])
    checks.owners_of(owners, image_units.shape[0], folded_text_units.shape[0])
    checks.same_device(image_units=image_units, folded_text_units=folded_text_units, owners=owners)
    checks.finite("image_units", image_units)
    checks.finite("folded_text_units", folded_text_units)
    if use_kernels(image_units, folded_text_units):
        from esl_fast.kernels import ranks as kernel  # Triton is imported only where it is used

        common = torch.promote_types(image_units.dtype, folded_text_units.dtype)
        return kernel.retrieval_ranks(image_units.to(common), folded_text_units.to(common), owners.long())
    checks.owners_within(owners, image_units.shape[0])  # it waits anyway
    return blocked.ranks.retrieval_ranks(image_units, folded_text_units, owners.long())
