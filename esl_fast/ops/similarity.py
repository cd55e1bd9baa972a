"""All-pairs similarity of folded units."""

import torch
from torch import Tensor

from esl_fast import reference
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels, without_autocast


@without_autocast
def similarity(image_units: Tensor, folded_text_units: Tensor) -> Tensor:
    """``image_units (N, U) @ folded_text_units (M, U)^T -> (N, M)``, either side folded (see :func:`fold`)."""
    checks.matrix("image_units", image_units)
    checks.matrix("folded_text_units", folded_text_units, image_units.shape[1])
    checks.same_device(image_units=image_units, folded_text_units=folded_text_units)
    common = torch.promote_types(image_units.dtype, folded_text_units.dtype)
    image_units, folded_text_units = image_units.to(common), folded_text_units.to(common)
    if use_kernels(image_units, folded_text_units):
        from esl_fast.kernels import similarity as kernel  # Triton is imported only where it is used

        return kernel.similarity(image_units, folded_text_units)
    return reference.similarity.similarity(image_units, folded_text_units)
