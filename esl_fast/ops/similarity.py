"""All-pairs similarity of folded units."""

from collections.abc import Callable

import torch
from torch import Tensor

from esl_fast import blocked, reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_eager
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels


@without_autocast
def similarity(image_units: Tensor, folded_text_units: Tensor) -> Tensor:
    """``image_units (N, U) @ folded_text_units (M, U)^T -> (N, M)``, either side folded (see :func:`fold`)."""
    checks.matrix("image_units", image_units)
    checks.matrix("folded_text_units", folded_text_units, image_units.shape[1])
    checks.same_device(image_units=image_units, folded_text_units=folded_text_units)
    if image_units.dtype != folded_text_units.dtype:
        common = torch.promote_types(image_units.dtype, folded_text_units.dtype)
        image_units, folded_text_units = image_units.to(common), folded_text_units.to(common)
    if use_kernels(image_units, folded_text_units):
        from esl_fast.kernels import similarity as kernel  # Triton is imported only where it is used

        return kernel.similarity(image_units, folded_text_units)
    return reference.similarity.similarity(image_units, folded_text_units)


def streams(*features: Tensor) -> bool:
    """Whether :func:`streamed_similarity` serves features: on a CPU, without gradients, where the kernels do not."""
    if torch.is_grad_enabled() or not is_eager():
        return False
    return all(isinstance(x, Tensor) and x.device.type == "cpu" for x in features) and not use_kernels(*features)


@without_autocast
def streamed_similarity(
    folded: Tensor, features: Tensor, units: Callable[[Tensor], Tensor], *, folded_side: str
) -> Tensor:
    """:func:`similarity` of one side's folded units and the other side's features, whose units are made block by block.

    Args:
        folded: folded units of one side, any float dtype.
        features: features of the other side, best the larger, in the same dtype.
        units: makes units of some of the features.
        folded_side: which side is folded, ``"image"`` or ``"text"``.

    Returns:
        ``(N, M)``, images by texts; not finite where a feature is not.
    """
    return blocked.similarity.similarity(folded, features, units, folded_side=folded_side)
