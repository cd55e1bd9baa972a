"""Symmetric InfoNCE of all-pairs similarity without the N x M matrix, forward and backward.

Forward: one pass over the tiles. A program owns every `row_groups`-th row block times every `col_groups`-th column
block; it keeps the running (max, sum of exponentials, sum of positives) of its rows in registers while it walks the
columns, and those of its columns in memory that only it touches. What the programs found is merged in a fixed order.

Backward: the gradient G of the logits is recomputed `CHUNK` rows at a time into scratch of the units' dtype, and two
plain products (cuBLAS) turn it into gradients of the units: with the forward, four products in all. Keeping G on chip
instead would need either a fifth product (one recomputation for each side) or sums across programs in no fixed
order. G is stored times `GAIN / max(row weight, column weight)`, at most 2 * GAIN, so that float16 holds it.

Memory beside units and gradients: scratch CHUNK * M elements, M * U float32 for the text gradient summed over chunks,
and 12 bytes for each row and column and program that touches it: linear in N + M.

Paper, N = M = 32,768, U = 1,022, bf16: forward 2.2 TFLOP, 2.8 ms at 790 TFLOP/s; backward 6.6 TFLOP, 8.3 ms; the
scratch costs 3 x 2.1 GB, 1.3 ms at 4.8 TB/s, in the shadow of the products. On top of its product a tile of
128 x 256 takes 64 Ki exponentials, some 4,096 cycles at 16 a cycle, against 16,384 of wgmma.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._common import on_device_of
from esl_fast.kernels.inspect import CompileCase
from esl_fast.kernels.similarity import DEVICES, padded_empty
from esl_fast.kernels.tile import (
    GROUP,
    Plan,
    check_operands,
    eighths,
    launch_options,
    make_plan,
    tile_cases,
    tile_origin,
    tile_product,
)

CHUNK = 4096
GAIN_BITS = 14
MERGE_BLOCK = 256
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = 0.6931471805599453

# What a pair of equal ids is. DIAGONAL has no ids.
DIAGONAL, POSITIVE, IGNORE = 0, 1, 2


@triton.jit
def _special(image_ids, text_ids, row, col, n, m, ROWS: tl.constexpr, COLS: tl.constexpr, MODE: tl.constexpr):
    """Whether a tile may hold a pair that is positive or to be ignored."""
    special = (row < col + COLS) & (col < row + ROWS)
    if MODE != 0:
        row_ids = tl.load(image_ids + tl.minimum(row + tl.arange(0, ROWS), n - 1))
        col_ids = tl.load(text_ids + tl.minimum(col + tl.arange(0, COLS), m - 1))
        meet = (tl.max(row_ids, 0) >= tl.min(col_ids, 0)) & (tl.min(row_ids, 0) <= tl.max(col_ids, 0))
        special = meet | (special & (MODE == 2))
    return special


@triton.jit
def _pairs(image_ids, text_ids, row, col, n, m, ROWS: tl.constexpr, COLS: tl.constexpr, MODE: tl.constexpr):
    """Masks ``(ROWS, COLS)`` of the pairs that are positive and of those to be ignored, within the matrix."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    inside = (r < n - row)[:, None] & (c < m - col)[None, :]
    diagonal = (r + (row - col).to(tl.int32))[:, None] == c[None, :]
    if MODE == 0:
        return diagonal & inside, diagonal & (r < 0)[:, None]
    else:
        row_ids = tl.load(image_ids + row + r, mask=r < n - row, other=-1)
        col_ids = tl.load(text_ids + col + c, mask=c < m - col, other=-2)
        same = row_ids[:, None] == col_ids[None, :]
        if MODE == 1:
            return same, same & (r < 0)[:, None]
        else:
            return diagonal & inside, same & (diagonal == 0)


@triton.jit
def _online(old_max, old_sum, logits, AXIS: tl.constexpr):
    """Running maximum and sum of 2^(logit - maximum) along an axis, with what is -inf throughout counting nothing."""
    new_max = tl.maximum(old_max, tl.max(logits, AXIS))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    total = tl.sum(tl.exp2(logits - tl.expand_dims(shift, AXIS)), AXIS)
    return new_max, old_sum * tl.exp2(old_max - shift) + total


@triton.jit(do_not_specialize=["n", "m", "units", "row_groups", "col_groups"])
def _forward_kernel(
    a, b, logit_scale, image_ids, text_ids, row_parts, col_parts, n, m, units, a_row, a_unit, b_row, b_unit,
    row_groups, col_groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, MODE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Parts are ``(3, groups, n or m)``: maximum and sum of 2^(logit - maximum), sum of positive logits, in base 2."""
    program = tl.program_id(0).to(tl.int64)
    row_group = program // col_groups
    col_group = program % col_groups
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    row_plane = n.to(tl.int64) * col_groups
    col_plane = m.to(tl.int64) * row_groups
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 8)
    for row_block in range(row_group, tl.cdiv(n, ROWS), row_groups):
        row = row_block * ROWS
        row_max = tl.full((ROWS,), float("-inf"), tl.float32)
        row_sum = tl.zeros((ROWS,), tl.float32)
        row_positive = tl.zeros((ROWS,), tl.float32)
        for col_block in range(col_group, tl.cdiv(m, COLS), col_groups):
            first_col = col_block * COLS
            scores = tile_product(
                a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
                ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
            )  # fmt: skip
            special = _special(image_ids, text_ids, row, first_col, n, m, ROWS, COLS, MODE)
            parts = eighths(scores)
            for eighth in tl.static_range(8):
                col = first_col + eighth * (COLS // 8)
                live = c < m - col
                logits = tl.where((r < n - row)[:, None] & live[None, :], parts[eighth] * scale, float("-inf"))
                col_positive = tl.zeros((COLS // 8,), tl.float32)
                if special:
                    positive, ignored = _pairs(image_ids, text_ids, row, col, n, m, ROWS, COLS // 8, MODE)
                    if MODE == 2:
                        logits = tl.where(ignored, float("-inf"), logits)
                    chosen = tl.where(positive, logits, 0.0)
                    row_positive += tl.sum(chosen, 1)
                    col_positive += tl.sum(chosen, 0)
                row_max, row_sum = _online(row_max, row_sum, logits, 1)

                part = col_parts + row_group * m + col + c
                again = c < tl.where(row_block > row_group, m - col, 0)
                old_max = tl.load(part, mask=again, other=float("-inf"))
                old_sum = tl.load(part + col_plane, mask=again, other=0.0)
                old_positive = tl.load(part + 2 * col_plane, mask=again, other=0.0)
                col_max, col_sum = _online(old_max, old_sum, logits, 0)
                tl.store(part, col_max, mask=live)
                tl.store(part + col_plane, col_sum, mask=live)
                tl.store(part + 2 * col_plane, old_positive + col_positive, mask=live)
            # The next row block reads them back, perhaps in another thread.
            tl.debug_barrier()
        part = row_parts + col_group * n + row + r
        tl.store(part, row_max, mask=r < n - row)
        tl.store(part + row_plane, row_sum, mask=r < n - row)
        tl.store(part + 2 * row_plane, row_positive, mask=r < n - row)


@triton.jit(do_not_specialize=["groups", "count"])
def _merge_kernel(parts, log_sums, positives, groups, count, BLOCK: tl.constexpr):
    """Log-sum-exp (base 2) and sum of positive logits from parts ``(3, groups, count)``."""
    items = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = items < count
    plane = tl.zeros((), tl.int64) + count * groups.to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    positive = tl.zeros((BLOCK,), tl.float32)
    for group in range(0, groups):
        part = parts + group * count.to(tl.int64) + items
        other = tl.load(part, mask=live, other=float("-inf"))
        other_sum = tl.load(part + plane, mask=live, other=0.0)
        positive += tl.load(part + 2 * plane, mask=live, other=0.0)
        new = tl.maximum(largest, other)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - shift) + other_sum * tl.exp2(other - shift)
        largest = new
    tl.store(log_sums + items, largest + tl.log2(tl.where(live, total, 1.0)), mask=live)
    tl.store(positives + items, positive, mask=live)


@triton.jit(do_not_specialize=["n", "m", "units", "first_row", "last_row", "grad_row"])
def _gradient_kernel(
    a, b, logit_scale, row_shift, col_shift, row_target, col_target, image_ids, text_ids, grad, scale_parts,
    n, m, units, a_row, a_unit, b_row, b_unit, first_row, last_row, grad_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row`` to ``last_row`` of the gradient of the logits, and a part of its sum times the scores.

    ``gradient = 2^(logit - row_shift) + 2^(logit - col_shift)``, less ``row_target + col_target`` at positives.
    """
    row_blocks = tl.cdiv(last_row - first_row, ROWS).to(tl.int64)
    col_blocks = tl.cdiv(m, COLS).to(tl.int64)
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    stride = tl.multiple_of(grad_row.to(tl.int64), 16)
    by_row = tl.zeros((ROWS,), tl.float32)
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 8)
    for tile in tl.range(program, row_blocks * col_blocks, tl.num_programs(0), flatten=FLATTEN):
        local, first_col = tile_origin(tile, row_blocks, col_blocks, ROWS, COLS, GROUP)
        row = first_row + local
        scores = tile_product(
            a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        row_live = r < last_row - row
        row_over = tl.load(row_shift + row + r, mask=row_live, other=float("inf"))
        special = _special(image_ids, text_ids, row, first_col, n, m, ROWS, COLS, MODE)
        parts = eighths(scores)
        for eighth in tl.static_range(8):
            col = first_col + eighth * (COLS // 8)
            score = parts[eighth]
            live = row_live[:, None] & (c < m - col)[None, :]
            col_over = tl.load(col_shift + col + c, mask=c < m - col, other=float("inf"))
            gradient = tl.exp2(score * scale - row_over[:, None]) + tl.exp2(score * scale - col_over[None, :])
            if special:
                positive, ignored = _pairs(image_ids, text_ids, row, col, n, m, ROWS, COLS // 8, MODE)
                if MODE == 2:
                    gradient = tl.where(ignored, 0.0, gradient)
                target = tl.load(row_target + row + r, mask=row_live, other=0.0)[:, None]
                target += tl.load(col_target + col + c, mask=c < m - col, other=0.0)[None, :]
                gradient = tl.where(positive, gradient - target, gradient)
            gradient = tl.where(live, gradient, 0.0)
            by_row += tl.sum(gradient * score, 1)
            out = grad + local * stride + col + r[:, None] * stride + c[None, :]
            inside = row_live[:, None] & (c < stride - col)[None, :]
            tl.store(out, gradient.to(grad.dtype.element_ty), mask=inside)
    tl.store(scale_parts + program, tl.sum(by_row, 0))


def _groups(plan: Plan) -> tuple[int, int]:
    """Row and column groups, one program each: the split that leaves the fullest program the fewest tiles.

    Of equal ones that with the fewest row groups, since a part of the columns is kept for each.
    """
    rows, cols, programs = plan.row_blocks, plan.col_blocks, plan.programs

    def cost(col_groups: int) -> tuple[int, int]:
        row_groups = max(1, min(rows, programs // col_groups))
        return triton.cdiv(rows, row_groups) * triton.cdiv(cols, col_groups), row_groups

    col_groups = min(range(1, min(cols, programs) + 1), key=cost)
    return cost(col_groups)[1], col_groups


def _merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    _, groups, count = parts.shape
    log_sums, positives = torch.empty_like(parts[0, 0]), torch.empty_like(parts[0, 0])
    _merge_kernel[(triton.cdiv(count, MERGE_BLOCK),)](
        parts, log_sums, positives, groups, count, BLOCK=MERGE_BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return log_sums, positives


def _ordinals(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as int32 from 0 in the same order: half the registers to compare."""
    every = torch.cat([image_ids, text_ids]).sort().values
    return torch.searchsorted(every, image_ids, out_int32=True), torch.searchsorted(every, text_ids, out_int32=True)


def _counts(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of ``ids`` occurs in ``among``, without a synchronisation."""
    among = among.sort().values
    return torch.searchsorted(among, ids, right=True) - torch.searchsorted(among, ids)


def _side(log_sums: Tensor, positives: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss of a side, its weight of each item (1 / number of items with positives), target and shift."""
    if count is None:
        count = torch.ones_like(log_sums)
    owned = count > 0
    weight = 1.0 / owned.sum().clamp(min=1).to(torch.float32)
    target = owned / count.clamp(min=1)
    loss = torch.where(owned, log_sums - positives * target, 0.0).sum() * weight * LN2
    return loss, weight, target, torch.where(owned, log_sums, torch.inf)


@torch.library.custom_op("esl_fast::contrastive_forward", mutates_args=(), device_types=DEVICES)
def contrastive_forward(
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, and for the backward: shifts and targets of rows and columns (see the kernel), and G's weight."""
    n, m = image_units.shape[0], folded_text_units.shape[0]
    if not n or not m:
        empty = image_units.new_zeros(n + m, dtype=torch.float32)
        zero = image_units.new_zeros((), dtype=torch.float32)
        return zero, empty[:n].clone(), empty[n:].clone(), empty[:n].clone(), empty[n:].clone(), zero.clone()
    with on_device_of(image_units):
        plan = make_plan(image_units, folded_text_units)
        row_groups, col_groups = _groups(plan)
        row_parts = torch.empty(3, col_groups, n, dtype=torch.float32, device=image_units.device)
        col_parts = torch.empty(3, row_groups, m, dtype=torch.float32, device=image_units.device)
        _forward_kernel[(row_groups * col_groups,)](
            *plan.operands,
            logit_scale,
            image_ids,
            text_ids,
            row_parts,
            col_parts,
            *plan.sizes,
            row_groups,
            col_groups,
            MODE=mode,
            **plan.constants,
            **launch_options(plan.config),
        )
        row_counts = col_counts = None
        if mode == POSITIVE:
            row_counts, col_counts = _counts(image_ids, text_ids), _counts(text_ids, image_ids)
        row_loss, row_weight, row_target, row_shift = _side(*_merge(row_parts), row_counts)
        col_loss, col_weight, col_target, col_shift = _side(*_merge(col_parts), col_counts)
        # G is stored relative to the larger weight: 2^GAIN_BITS times ratios of at most 1.
        weight = torch.maximum(row_weight, col_weight)
        row_ratio, col_ratio = row_weight / weight, col_weight / weight
        gain = 2.0**GAIN_BITS
        return (
            (row_loss + col_loss) / 2,
            row_shift - row_ratio.log2() - GAIN_BITS,
            col_shift - col_ratio.log2() - GAIN_BITS,
            row_target * (row_ratio * gain),
            col_target * (col_ratio * gain),
            weight / (2 * gain),
        )


@contrastive_forward.register_fake
def _(image_units, folded_text_units, logit_scale, image_ids, text_ids, mode):
    n, m = image_units.shape[0], folded_text_units.shape[0]
    return tuple(image_units.new_empty(shape, dtype=torch.float32) for shape in ((), (n,), (m,), (n,), (m,), ()))


@torch.library.custom_op("esl_fast::contrastive_backward", mutates_args=(), device_types=DEVICES)
def contrastive_backward(
    grad: Tensor,
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mode: int,
    row_shift: Tensor,
    col_shift: Tensor,
    row_target: Tensor,
    col_target: Tensor,
    weight: Tensor,
    needs_image: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image units, text units (of no rows where not needed) and logit scale."""
    n, units = image_units.shape
    m = folded_text_units.shape[0]
    grad_image = torch.empty_like(image_units[: n if needs_image else 0], memory_format=torch.contiguous_format)
    if not n or not m:
        grad_text = folded_text_units.new_zeros(m if needs_text else 0, units)
        return grad_image.zero_(), grad_text, torch.zeros_like(logit_scale)
    with on_device_of(image_units):
        plan = make_plan(image_units, folded_text_units)
        factor = grad.to(torch.float32) * weight
        unit_factor = factor * logit_scale.to(torch.float32)
        scratch = padded_empty(min(n, CHUNK), m, image_units, image_units.dtype)
        scale_parts = image_units.new_zeros(triton.cdiv(n, CHUNK), plan.programs, dtype=torch.float32)
        text_total = None
        for chunk, first in enumerate(range(0, n, CHUNK)):
            last = min(n, first + CHUNK)
            programs = min(plan.programs, triton.cdiv(last - first, plan.config.rows) * plan.col_blocks)
            _gradient_kernel[(programs,)](
                *plan.operands,
                logit_scale,
                row_shift,
                col_shift,
                row_target,
                col_target,
                image_ids,
                text_ids,
                scratch,
                scale_parts[chunk],
                *plan.sizes,
                first,
                last,
                scratch.stride(0),
                MODE=mode,
                GROUP=GROUP,
                FLATTEN=plan.flatten,
                **plan.constants,
                **launch_options(plan.config),
            )
            gradient = scratch[: last - first]
            if needs_image:
                torch.mul(_product(gradient, folded_text_units), unit_factor, out=grad_image[first:last])
            if needs_text:
                text_total = _product(gradient.mT, image_units[first:last], text_total)
        grad_scale = (scale_parts.sum() * factor).to(logit_scale.dtype).reshape(logit_scale.shape)
        if text_total is None:
            return grad_image, folded_text_units.new_empty(0, units), grad_scale
        return grad_image, (text_total * unit_factor).to(folded_text_units.dtype), grad_scale


@contrastive_backward.register_fake
def _(grad, image_units, folded_text_units, logit_scale, *args):
    needs_image, needs_text = args[-2:]
    (n, units), m = image_units.shape, folded_text_units.shape[0]
    return (
        image_units.new_empty(n if needs_image else 0, units),
        folded_text_units.new_empty(m if needs_text else 0, units),
        torch.empty_like(logit_scale),
    )


def _product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """``a @ b`` in float32, added to ``total`` in place if given."""
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _setup_context(ctx, inputs, output):
    image_units, folded_text_units, logit_scale, image_ids, text_ids, mode = inputs
    ctx.mode = mode
    ctx.save_for_backward(image_units, folded_text_units, logit_scale, image_ids, text_ids, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
    if grad is None:
        return None, None, None, None, None, None
    image_units, folded_text_units, logit_scale, image_ids, text_ids, *saved = ctx.saved_tensors
    grads = contrastive_backward(
        grad,
        image_units,
        folded_text_units,
        logit_scale,
        image_ids,
        text_ids,
        ctx.mode,
        *saved,
        needs_image,
        needs_text,
    )
    needed = (needs_image, needs_text, needs_scale)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None)


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)


def contrastive_loss(
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_owner: str = "positive",
) -> Tensor:
    """Symmetric InfoNCE of ``logit_scale * image_units @ folded_text_units^T``, a float32 scalar.

    As :func:`esl_fast.reference.contrastive.contrastive_loss` defines it, from units ``(N, U)`` and ``(M, U)`` of one
    dtype (float32, bfloat16 or float16, any strides), ``logit_scale`` with one element on their device (the factor
    itself, not its logarithm), and integer ids ``(N,)`` and ``(M,)``. Differentiable (once) in the first three.

    Raises ValueError for other shapes, dtypes, modes, and for N != M where the diagonal is positive.
    """
    check_operands(image_units, folded_text_units)
    n, m = image_units.shape[0], folded_text_units.shape[0]
    if same_owner not in ("positive", "ignore", "negative"):
        raise ValueError(f'same_owner is {same_owner!r}, accepted: "positive", "ignore", "negative"')
    if logit_scale.numel() != 1 or logit_scale.device != image_units.device:
        given = f"{tuple(logit_scale.shape)} on {logit_scale.device}"
        raise ValueError(f"expected one logit_scale on {image_units.device}, got {given}")
    if (image_ids is None) != (text_ids is None):
        raise ValueError("give both image_ids and text_ids, or neither")
    mode = DIAGONAL
    if image_ids is not None and same_owner != "negative":
        if image_ids.shape != (n,) or text_ids.shape != (m,):
            given = f"{tuple(image_ids.shape)} and {tuple(text_ids.shape)}"
            raise ValueError(f"expected ids ({n},) and ({m},), got {given}")
        mode = POSITIVE if same_owner == "positive" else IGNORE
        image_ids, text_ids = _ordinals(image_ids.contiguous(), text_ids.contiguous())
    else:
        image_ids = text_ids = None
    if mode != POSITIVE and n != m:
        raise ValueError(f"the diagonal is positive, which needs as many images as texts; got {n} and {m}")
    return contrastive_forward(image_units, folded_text_units, logit_scale, image_ids, text_ids, mode)[0]


def compile_cases() -> list[CompileCase]:
    n, units = 32_768, 1_022
    variants: list[tuple[str, dict[str, Any]]] = [
        ("diagonal", {"MODE": DIAGONAL, "image_ids": None, "text_ids": None}),
        ("positive", {"MODE": POSITIVE}),
        ("ignore", {"MODE": IGNORE}),
    ]
    ids = {"image_ids": "*i32", "text_ids": "*i32", "logit_scale": "*fp32"}
    forward = tile_cases(
        "contrastive_forward_32k",
        _forward_kernel,
        {**ids, "row_parts": "*fp32", "col_parts": "*fp32", "row_groups": "i32", "col_groups": "i32"},
        variants,
        lambda itemsize: (2.0 * n * n * units, itemsize * 2.0 * n * units),
        divisible=("row_parts", "col_parts"),
    )
    sides = dict.fromkeys(("row_shift", "col_shift", "row_target", "col_target", "scale_parts"), "*fp32")
    gradient = tile_cases(
        "contrastive_gradient_4k_x_32k",
        _gradient_kernel,
        {**ids, **sides, "grad": "*DTYPE", "first_row": "i32", "last_row": "i32", "grad_row": "i32"},
        [(name, {"GROUP": GROUP, **extra}) for name, extra in variants],
        lambda itemsize: (2.0 * CHUNK * n * units, itemsize * (1.0 * (CHUNK + n) * units + CHUNK * n)),
        divisible=("row_shift", "col_shift", "row_target", "col_target", "grad"),
    )
    merge = CompileCase(
        name="merge_32k_x_66",
        kernel=_merge_kernel,
        signature={"parts": "*fp32", "log_sums": "*fp32", "positives": "*fp32", "groups": "i32", "count": "i32"},
        constexprs={"BLOCK": MERGE_BLOCK},
        num_warps=4,
        num_stages=3,
        divisible=("parts", "log_sums", "positives"),
        flops=10.0 * 66 * n,
        bytes=4.0 * 3 * 66 * n,
        precision="fp32",
        options={"enable_fp_fusion": True},
    )
    return [*forward, *gradient, merge]
