"""Both sides of a similarity as one step of autograd: units of both, degrees, and the fold of the smaller side.

It launches what the ops it stands for launch, in their order, and so gives to the bit what they give. One by one, each
looks through its arguments and has a node in the graph, which at batch 64 takes the host longer than all kernels take
the GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esl_fast._autograd import first_order
from esl_fast.kernels._op import Step, backwards, gather, save_steps
from esl_fast.kernels.aggregate import _aggregate_adaptive, _aggregate_heuristic
from esl_fast.kernels.contribution import _degrees_scales, _flat, _fold
from esl_fast.kernels.select import Selection


class _Sides(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths, chains, normalize, selections, *flat):
        features, degrees, matrices, *weights = gather(flat, lengths)
        if selections is None:
            steps = [
                Step(_aggregate_heuristic, x, taps, chain, normalize)
                for x, (taps,), chain in zip(features, weights, chains, strict=True)
            ]
        else:
            steps = [
                Step(_aggregate_adaptive, x, raw, selection, chain, normalize)
                for x, raw, selection, chain in zip(features, weights, selections, chains, strict=True)
            ]
        sides = [step.output for step in steps]
        images, texts = features
        folded, name = (0, "image") if images.shape[0] < texts.shape[0] else (1, "text")
        scales = Step(_degrees_scales, *degrees, True, True, True)
        fold = Step(_fold, sides[folded], matrices, _flat(matrices), scales.output, name)
        sides[folded] = fold.output
        save_steps(ctx, [*steps, scales, fold])
        ctx.lengths, ctx.folded = lengths, folded
        to_features, to_degrees, to_matrices, *to_weights = gather(ctx.needs_input_grad[4:], lengths)
        ctx.to_units = [x or any(side) for x, side in zip(to_features, to_weights, strict=True)]
        constant = [side for side, wanted in zip(sides, ctx.to_units, strict=True) if not wanted]
        if any(to_degrees) or any(to_matrices):
            constant = [side for side in constant if side is not sides[folded]]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(sides)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        *units, degrees, fold = backwards(ctx)
        grads, folded = list(grads), ctx.folded
        results: list[Any] = [[None] * n for n in ctx.lengths]
        if grads[folded] is not None:
            grads[folded], results[2], _, grad_scales, _ = fold(grads[folded])
            results[1] = degrees(grad_scales)[:3]
        for i, backward in enumerate(units):
            if grads[i] is not None and ctx.to_units[i]:
                results[0][i], grad_weights, *_ = backward(grads[i])
                results[3 + i] = [grad_weights] if isinstance(grad_weights, Tensor) else grad_weights
        return None, None, None, None, *(grad for group in results for grad in group)


def sides(
    features: tuple[Tensor, Tensor],
    degrees: tuple[Tensor, Tensor, Tensor],
    matrices: Sequence[Tensor],
    weights: tuple[Sequence[Tensor], Sequence[Tensor]],
    selections: tuple[Selection, Selection] | None,
    chains: tuple[str, str],
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """``(N, U)`` and ``(M, U)`` of features ``(N, d)`` of images and ``(M, d)`` of texts, the smaller side folded.

    Args:
        features: of images and of texts, plain tensors of one dtype on one device, as everything else is.
        degrees: what :func:`degrees_scales` takes.
        matrices: D_k of level 0 to L.
        weights: of the two aggregators: the taps alone, or the raw matrices of level 1 to L.
        selections: made of the weights, if these are matrices.
        chains: of the two aggregators.
        normalize: divide embeddings by their norm first.
    """
    groups = (features, degrees, matrices, *weights)
    flat = (tensor for group in groups for tensor in group)
    return _Sides.apply(tuple(map(len, groups)), chains, normalize, selections, *flat)
