"""Both sides of a similarity at once, where that is faster than one op after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esl_fast._autocast import without_autocast
from esl_fast.ops.backend import use_kernels

Weights = Tensor | Sequence[Tensor]


def in_one_step(
    images: Tensor, texts: Tensor, width: int, parameters: Sequence[Tensor], shapes: list[torch.Size]
) -> bool:
    """Whether :func:`sides` serves: eager calls of the kernels, and nothing amiss.

    False for anything wrong: the ops, one by one, then raise the error. ``width`` and ``shapes`` are what features and
    parameters must have.
    """
    if torch.compiler.is_compiling() or not isinstance(images, Tensor) or not use_kernels(images):
        return False
    from esl_fast.kernels._op import plain  # Triton is imported only where it is used

    dtype, device = images.dtype, images.device
    return (
        plain([images, texts, *parameters])
        and dtype.is_floating_point
        and texts.dtype == dtype
        and images.ndim == texts.ndim == 2
        and images.shape[1] == texts.shape[1] == width
        and [p.shape for p in parameters] == shapes
        and all(x.device == device for x in (texts, *parameters))
    )


@without_autocast
def sides(
    images: Tensor,
    texts: Tensor,
    weights: tuple[Weights, Weights],
    degrees: tuple[Tensor, Tensor, Tensor],
    matrices: Sequence[Tensor],
    *,
    chains: tuple[str, str],
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Units of both sides, the smaller one folded: :func:`aggregate`, :func:`degrees` and :func:`fold`, to the bit.

    Args:
        images, texts: features ``(N, d)`` and ``(M, d)`` of one dtype.
        weights: of the images' and of the texts' aggregator, each as :func:`aggregate` takes them, of the same shapes.
        degrees: ``w`` and both temperatures, as :func:`degrees` takes them; of the global variant.
        matrices: D_k, one a level.
        chains, normalize: as in :func:`aggregate`.
    """
    from esl_fast.kernels.select import select_both  # Triton is imported only where it is used
    from esl_fast.kernels.sides import sides as kernel

    features = images, texts
    if isinstance(weights[0], Tensor):
        return kernel(features, degrees, matrices, [(taps,) for taps in weights], None, chains, normalize)
    return kernel(features, degrees, matrices, weights, select_both(*weights), chains, normalize)
