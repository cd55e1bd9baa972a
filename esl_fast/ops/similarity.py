"""All-pairs similarity of folded units."""

from torch import Tensor

from esl_fast import reference
from esl_fast.ops import checks
from esl_fast.ops.backend import without_autocast


@without_autocast
def similarity(image_units: Tensor, folded_text_units: Tensor) -> Tensor:
    """``image_units (N, U) @ folded_text_units (M, U)^T -> (N, M)``, either side folded (see :func:`fold`)."""
    checks.matrix("image_units", image_units)
    checks.matrix("folded_text_units", folded_text_units, image_units.shape[1])
    checks.same_device(image_units=image_units, folded_text_units=folded_text_units)
    return reference.similarity.similarity(image_units, folded_text_units)
