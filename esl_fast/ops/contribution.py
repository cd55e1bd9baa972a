"""Sparse contribution: degrees, and folding them with D_k into one side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esl_fast import blocked, reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_eager
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels
from esl_fast.ops.cache import WeightsCache

SIDES = ("image", "text")


def degrees(
    w: Tensor,
    temp_scale_1: Tensor,
    temp_scale_2: Tensor,
    *,
    sigmoid_gate: bool = True,
    sharp: bool = True,
    mean: bool = False,
) -> Tensor:
    """Contribution degree of each level, ``exp((|w_k| - threshold) * sharpness) * w_k`` for ``w (L+1,)``.

    ``threshold = (max|w| - min|w|) * gate + min|w|``; gradients flow to all three, through max and min too.

    Args:
        w: ``(L+1,)``, one weight a level.
        temp_scale_1: one value; the gate is its sigmoid (global variant) or, without ``sigmoid_gate``, itself.
        temp_scale_2: one value; the sharpness is its exponential or, without ``sharp``, 0 (``degree_k = w_k``).
        mean: divide by the number of levels, as :func:`fold` wants it for the global variant.

    Returns:
        ``(L+1,)`` in float32 (or float64).

    Raises:
        TypeError, ValueError: wrong types or shapes.
    """
    for name, x in (("w", w), ("temp_scale_1", temp_scale_1), ("temp_scale_2", temp_scale_2)):
        checks.floating(name, x)
    if w.ndim != 1 or w.numel() == 0 or temp_scale_1.numel() != 1 or temp_scale_2.numel() != 1:
        raise ValueError(
            f"degrees takes w (L+1,) and two scalars, given shapes {tuple(w.shape)}, {tuple(temp_scale_1.shape)}, "
            f"{tuple(temp_scale_2.shape)}"
        )
    if use_kernels(w):
        from esl_fast.kernels import contribution as kernel  # Triton is imported only where it is used

        return kernel.degrees_scales(w, temp_scale_1, temp_scale_2, sigmoid_gate=sigmoid_gate, sharp=sharp, mean=mean)
    # Half a precision of w would be many times as much after the exponential.
    compute = torch.promote_types(w.dtype, torch.float32)
    w, gate, sharpness = (x.to(compute) for x in (w, temp_scale_1.reshape(()), temp_scale_2.reshape(())))
    degree = reference.contribution.degrees(
        w, gate.sigmoid() if sigmoid_gate else gate, sharpness.exp() if sharp else 0 * sharpness
    )
    return degree / len(w) if mean else degree


@without_autocast
def fold(
    units: Tensor, matrices: Sequence[Tensor], scales: Tensor, *, side: str, cache: WeightsCache | None = None
) -> Tensor:
    """Multiply level k of ``units (..., U)`` by ``scales[k] * D_k``, so that one dot product gives the similarity.

    Args:
        units: units of one side, any float dtype.
        matrices: D_k ``(d_k, d_k)``, one a level.
        scales: ``(L+1,)``; the global variant's are ``degree_k / (L+1)``.
        side: which side ``units`` are: ``"text"`` applies D_k (``x . D y``), ``"image"`` its transpose.
        cache: keeps what is made of unchanging matrices between calls.

    Returns:
        Folded units, same shape and dtype; computed in float32 or float64.

    Raises:
        TypeError, ValueError: wrong types, shapes, side or devices.
    """
    checks.floating("units", units)
    checks.floating("scales", scales)
    checks.one_of("side", side, SIDES)
    width = sum(m.shape[0] for m in matrices)
    if units.shape[-1] != width or scales.shape != (len(matrices),):
        raise ValueError(
            f"units {tuple(units.shape)} and scales {tuple(scales.shape)} do not fit {len(matrices)} levels of "
            f"{width} units in all"
        )
    device = units.device
    for level, matrix in enumerate(matrices):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
            checks.matrix(f"matrices[{level}]", matrix, matrix.shape[0])
        if matrix.device != device:
            checks.same_device(units=units, **{f"matrices[{level}]": matrix})
    checks.same_device(units=units, scales=scales)
    rows = units.reshape(-1, width)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (units, scales, *matrices))
    if use_kernels(rows):
        from esl_fast.kernels import contribution as kernel  # Triton is imported only where it is used

        if cache is None or grad:
            return kernel.fold(rows, matrices, scales, side).view(units.shape)
        packed = cache.get(f"{side} {rows.dtype}", matrices, lambda given: kernel.pack(given, rows.dtype, side))
        return kernel.fold_packed(rows, packed, [len(m) for m in matrices], scales).view(units.shape)
    compute = torch.promote_types(units.dtype, torch.float32)
    arguments = (rows.to(compute), [m.to(compute) for m in matrices], scales.to(compute))
    if grad or rows.device.type != "cpu" or not is_eager():
        folded = reference.contribution.fold(*arguments, side=side)
    else:
        folded = blocked.contribution.fold(*arguments, side=side)
    folded = folded.to(units.dtype)
    return folded.view(units.shape) if units.ndim != 2 else folded
