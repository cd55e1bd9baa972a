"""Symmetric InfoNCE of all-pairs similarity without the N x M matrix, forward and backward.

Forward: one pass over the tiles. A program owns every `row_groups`-th row block times every `col_groups`-th column
block and walks down columns. Rows and columns share one exponential a pair, 2^(logit - center): a column's sum stays in
registers, each thread's own rows apart, until the walk is over; a row's is added to memory that only this program
touches. The center is the smallest logit of a positive on the diagonal. Whether that was a good one shows in the sums:
unless all lie between 2^-80 and 2^120 (logits of a row or column would have to spread over some 80 nats), a second
kernel does it again with running maxima; nothing waits for the host to find out, the second one returns at once if it
is not needed. Batches of fewer than `CENTERED_FROM` pairs, too few for that to pay, take the second kernel alone.

Backward: the gradient G of the logits is recomputed `_chunk` rows at a time into scratch of the units' dtype, with the
same single exponential, and two plain products (cuBLAS) turn it into gradients of the units: with the forward, four
products in all. Keeping G on chip instead would need either a fifth product (one recomputation for each side) or
sums across programs in no fixed order. G is stored times `GAIN / max(row weight, column weight)`, at most 2 * GAIN, so
that float16 holds it. On the diagonal, where a probability near 1 is subtracted from its target, it is computed apart.

Memory beside units and gradients: scratch of `_chunk` * M elements, M * U float32 for the text gradient summed over
chunks, and 12 bytes for each row and column and program that touches it: linear in N + M. The scratch of 32,768 pairs
is 0.55 GB in 16 bits on an H200, 1.1 GB in TF32.

Paper, N = M = 32,768, U = 1,022, bf16: forward 2.2 TFLOP, 2.8 ms at 790 TFLOP/s; backward 6.6 TFLOP, 8.3 ms; the
scratch costs 3 x 2.1 GB, 1.3 ms at 4.8 TB/s, in the shadow of the products. On top of its product a tile of
256 x 128 takes 32 Ki exponentials, 2,048 cycles at 16 a cycle, against 16,384 of wgmma.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import cdiv, next_power_of_2, on_device_of, padded_rows, widened
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.paired import paired_scores
from esl_fast.kernels.plan import GROUP, Plan, launch_options, make_plan, output, sweeps, tile_cases
from esl_fast.kernels.tile import (
    eighths,
    quarters,
    sum_own_cols,
    sum_own_rows,
    sweep_length,
    sweep_origin,
    tile_origin,
    tile_product,
)

CHUNK = 4096  # rows of the gradient of the logits at a time, at least
FINISH_BLOCK = 256
SCALE_BLOCK = 1024
GAIN_BITS = tl.constexpr(14)
GAIN = tl.constexpr(2.0**14)
LEAST, MOST = tl.constexpr(2.0**-80), tl.constexpr(2.0**120)
CENTERED_FROM = 1 << 22  # pairs from which the pass with a center pays
LOG2E = tl.constexpr(1.4426950408889634)
HALF_LN2 = tl.constexpr(0.34657359027997264)

# What a pair of equal ids is. DIAGONAL has no ids.
DIAGONAL, POSITIVE, IGNORE = 0, 1, 2


@triton.jit
def _special(image_ids, text_ids, row, col, n, m, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether a tile may hold a pair of equal ids."""
    row_ids = tl.load(image_ids + tl.minimum(row + tl.arange(0, ROWS), n - 1))
    col_ids = tl.load(text_ids + tl.minimum(col + tl.arange(0, COLS), m - 1))
    return (tl.max(row_ids, 0) >= tl.min(col_ids, 0)) & (tl.min(row_ids, 0) <= tl.max(col_ids, 0))


@triton.jit
def _same(image_ids, text_ids, row, col, n, m, ROWS: tl.constexpr, COLS: tl.constexpr, MODE: tl.constexpr):
    """Mask ``(ROWS, COLS)`` of the pairs within the matrix whose ids are equal, off the diagonal if ``MODE`` is 2."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    row_ids = tl.load(image_ids + row + r, mask=r < n - row, other=-1)
    col_ids = tl.load(text_ids + col + c, mask=c < m - col, other=-2)
    same = row_ids[:, None] == col_ids[None, :]
    if MODE == 2:
        same &= (r + (row - col).to(tl.int32))[:, None] != c[None, :]
    return same


@triton.jit
def _online(old_max, old_sum, logits, AXIS: tl.constexpr):
    """Running maximum and sum of 2^(logit - maximum) along an axis, with what is -inf throughout counting nothing."""
    new_max = tl.maximum(old_max, tl.max(logits, AXIS))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    total = tl.sum(tl.exp2(logits - tl.expand_dims(shift, AXIS)), AXIS)
    return new_max, old_sum * tl.exp2(old_max - shift) + total


@triton.jit(do_not_specialize=["n", "m", "units", "row_groups", "col_groups"])
def _sums_kernel(
    a, b, logit_scale, center, image_ids, text_ids, row_sums, col_sums, row_positives, col_positives,
    n, m, units, a_row, a_unit, b_row, b_unit, row_groups, col_groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Sums of 2^(logit - center) and, if ids say what is positive, of positive logits, all in base 2.

    Row results are ``(col_groups, n)``, added to from tile to tile; column results are ``(row_groups, m)``.
    """
    row_group = tl.program_id(0) // col_groups
    col_group = tl.program_id(0) % col_groups
    sweep = sweep_length(tl.cdiv(n, ROWS), row_group, row_groups)
    tiles = sweep * sweep_length(tl.cdiv(m, COLS), col_group, col_groups)
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    shift = tl.load(center)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 4)
    zeros = tl.zeros((8 * WARPS, COLS // 4), tl.float32)
    first = zeros
    second = zeros
    third = zeros
    fourth = zeros
    for tile in tl.range(0, tiles, flatten=FLATTEN):
        row, first_col = sweep_origin(tile, sweep, row_group, col_group, row_groups, col_groups, ROWS, COLS)
        scores = tile_product(
            a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        row_live = r < tl.minimum(n - row, ROWS).to(tl.int32)
        row_shift = tl.where(row_live, shift, float("inf"))
        if MODE != 0:
            special = _special(image_ids, text_ids, row, first_col, n, m, ROWS, COLS)
        row_parts = tl.zeros((ROWS, 4), tl.float32)
        parts = quarters(scores)
        for part in tl.static_range(4):
            col = first_col + part * (COLS // 4)
            score = parts[part]
            if MODE == 1:  # noqa: SIM102 (a constexpr with others would not keep the body from being compiled)
                if special:
                    same = _same(image_ids, text_ids, row, col, n, m, ROWS, COLS // 4, MODE)
                    chosen = tl.where(same, score * scale, 0.0)
                    by_row = row_positives + col_group.to(tl.int64) * n + row + r
                    tl.atomic_add(by_row, tl.sum(chosen, 1), mask=row_live, sem="relaxed")
                    by_col = col_positives + row_group.to(tl.int64) * m + col + c
                    tl.atomic_add(by_col, tl.sum(chosen, 0), mask=c < m - col, sem="relaxed")
            powers = tl.exp2(score * scale - row_shift[:, None])
            if MODE == 2:  # noqa: SIM102
                if special:
                    same = _same(image_ids, text_ids, row, col, n, m, ROWS, COLS // 4, MODE)
                    powers = tl.where(same, 0.0, powers)
            # A product that the sum takes in; selecting would cost an instruction a score.
            col_live = (c < tl.minimum(m - col, COLS).to(tl.int32)).to(tl.float32)
            row_parts += sum_own_cols(powers * col_live[None, :])
            col_sum = sum_own_rows(powers, WARPS)
            if part == 0:
                first += col_sum
            elif part == 1:
                second += col_sum
            elif part == 2:
                third += col_sum
            else:
                fourth += col_sum
        row_sum = tl.sum(row_parts, 1)
        # One program adds to an element, always from the same thread, so the order is fixed.
        tl.atomic_add(row_sums + col_group.to(tl.int64) * n + row + r, row_sum, mask=row_live, sem="relaxed")
        last = tile % sweep == sweep - 1
        if last:
            for part in tl.static_range(4):
                total = first if part == 0 else second if part == 1 else third if part == 2 else fourth
                at = first_col + part * (COLS // 4) + c
                tl.store(col_sums + row_group.to(tl.int64) * m + at, tl.sum(total, 0), mask=at < m)
        going_on = 1.0 - last.to(tl.float32)  # a product: selecting zeros here crashes Triton 3.6
        first *= going_on
        second *= going_on
        third *= going_on
        fourth *= going_on


@triton.jit(do_not_specialize=["n", "m", "units", "row_groups", "col_groups"])
def _online_kernel(
    a, b, logit_scale, bad, image_ids, text_ids, row_parts, col_parts, row_positives, col_positives,
    n, m, units, a_row, a_unit, b_row, b_unit, row_groups, col_groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, MODE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As :func:`_sums_kernel` for logits of any range, if its sums are ``bad`` or were not made (None); else nothing.

    Parts are ``(2, groups, n or m)``: maximum and sum of 2^(logit - maximum).
    """
    if bad is not None:  # noqa: SIM102 (a constexpr with others would not keep the body from being compiled)
        if tl.load(bad) == 0.0:
            return
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
            if MODE != 0:
                special = _special(image_ids, text_ids, row, first_col, n, m, ROWS, COLS)
            parts = eighths(scores)
            for eighth in tl.static_range(8):
                col = first_col + eighth * (COLS // 8)
                live = c < m - col
                logits = tl.where((r < n - row)[:, None] & live[None, :], parts[eighth] * scale, float("-inf"))
                again = c < tl.where(row_block > row_group, m - col, 0)
                if MODE != 0:
                    col_positive = tl.zeros((COLS // 8,), tl.float32)
                    if special:
                        same = _same(image_ids, text_ids, row, col, n, m, ROWS, COLS // 8, MODE)
                        if MODE == 2:
                            logits = tl.where(same, float("-inf"), logits)
                        else:
                            chosen = tl.where(same, logits, 0.0)
                            row_positive += tl.sum(chosen, 1)
                            col_positive += tl.sum(chosen, 0)
                    if MODE == 1:
                        positive = col_positives + row_group * m + col + c
                        old_positive = tl.load(positive, mask=again, other=0.0)
                        tl.store(positive, old_positive + col_positive, mask=live)
                row_max, row_sum = _online(row_max, row_sum, logits, 1)

                part = col_parts + row_group * m + col + c
                old_max = tl.load(part, mask=again, other=float("-inf"))
                old_sum = tl.load(part + col_plane, mask=again, other=0.0)
                col_max, col_sum = _online(old_max, old_sum, logits, 0)
                tl.store(part, col_max, mask=live)
                tl.store(part + col_plane, col_sum, mask=live)
            # The next row block reads them back, perhaps in another thread.
            tl.debug_barrier()
        part = row_parts + col_group * n + row + r
        tl.store(part, row_max, mask=r < n - row)
        tl.store(part + row_plane, row_sum, mask=r < n - row)
        if MODE == 1:
            tl.store(row_positives + col_group * n + row + r, row_positive, mask=r < n - row)


@triton.jit(do_not_specialize=["n", "m", "row_groups", "col_groups"])
def _total_kernel(row_sums, col_sums, center, totals, bad, n, m, row_groups, col_groups, BLOCK: tl.constexpr):
    """Sums of all groups, rows' and then columns', ``(n + m,)``; ``bad`` becomes 1 if one of them is out of range."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = item < n
    is_col = (is_row == 0) & (item < n.to(tl.int64) + m)
    total = tl.zeros((BLOCK,), tl.float32)
    for group in range(0, col_groups):
        total += tl.load(row_sums + group * n.to(tl.int64) + item, mask=is_row, other=0.0)
    for group in range(0, row_groups):
        total += tl.load(col_sums + group * m.to(tl.int64) + item - n, mask=is_col, other=0.0)
    tl.store(totals + item, total, mask=is_row | is_col)
    # Whatever was lost or overflew shows, and so does NaN.
    safe = (total > LEAST) & (total < MOST)
    wrong = tl.max(tl.where((is_row | is_col) & (safe == 0), 1.0, 0.0), 0)
    if tl.where(tl.abs(tl.load(center)) < 100.0, wrong, 1.0) > 0.0:
        tl.store(bad, 1.0)


@triton.jit
def _log_sum(parts, item, groups, count, live):
    """Log-sum-exp in base 2 from parts ``(2, groups, count)``."""
    plane = tl.zeros((), tl.int64) + count * groups.to(tl.int64)
    largest = tl.full(item.shape, float("-inf"), tl.float32)
    total = tl.zeros(item.shape, tl.float32)
    for group in range(0, groups):
        part = parts + group * count.to(tl.int64) + item
        other = tl.load(part, mask=live, other=float("-inf"))
        other_sum = tl.load(part + plane, mask=live, other=0.0)
        new = tl.maximum(largest, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - base) + other_sum * tl.exp2(other - base)
        largest = new
    return largest + tl.log2(tl.where(live, total, 1.0))


@triton.jit
def _finish_side(
    totals, first, parts, positives, counts, diagonal, center, centered, weight, ratio, item, groups, count, live,
    MODE: tl.constexpr,
):  # fmt: skip
    """Weighted losses, terms and targets of one side's items."""
    if totals is None:
        log_sum = _log_sum(parts, item, groups, count, live)
    elif centered:
        log_sum = tl.log2(tl.load(totals + first + item, mask=live, other=1.0)) + center
    else:
        log_sum = _log_sum(parts, item, groups, count, live)
    if MODE == 1:
        positive = tl.zeros(item.shape, tl.float32)
        for group in range(0, groups):
            positive += tl.load(positives + group * count.to(tl.int64) + item, mask=live, other=0.0)
        many = tl.load(counts + item, mask=live, other=0)
        target = tl.where(many > 0, 1.0 / tl.maximum(many, 1).to(tl.float32), 0.0)
    else:
        positive = diagonal
        target = tl.where(live, 1.0, 0.0)
    loss = tl.where(target > 0.0, log_sum - positive * target, 0.0) * weight
    shift = tl.where(target > 0.0, log_sum, float("inf")) - tl.log2(ratio) - GAIN_BITS
    term = shift
    if centered:
        term = tl.exp2(center - shift)
    return loss, term, target * ratio * GAIN


@triton.jit(do_not_specialize=["n", "m", "row_groups", "col_groups"])
def _finish_kernel(
    logit_scale, center, bad, totals, row_parts, col_parts, row_positives, col_positives, row_counts, col_counts,
    diagonal, weights, losses, row_terms, col_terms, row_targets, col_targets, on_diagonal, besides, center_used, unit,
    n, m, row_groups, col_groups, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, and what :func:`_gradient_kernel` needs; G's diagonal with its targets taken off (where ids do not say
    what is positive), and ``besides``, those targets times the scores. ``unit`` is what G is a multiple of.

    Where no sums about a center were made, ``center``, ``bad`` and ``totals`` are None. ``weights`` is None where every
    item has exactly one positive: both weights are then 1 / n."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = item < n
    is_col = item < m
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    if bad is None:
        centered = False
        middle = float("inf")
    else:
        centered = tl.load(bad) == 0.0
        middle = tl.where(centered, tl.load(center), float("inf"))
    if weights is None:
        row_weight = 1.0 / n.to(tl.float32)
        col_weight = row_weight
    else:
        row_weight = tl.load(weights)
        col_weight = tl.load(weights + 1)
    # G is stored relative to the larger weight: ratios are at most 1.
    weight = tl.maximum(row_weight, col_weight)
    score = tl.load(diagonal + item, mask=is_row & is_col, other=0.0)
    row_loss, row_term, row_target = _finish_side(
        totals, 0, row_parts, row_positives, row_counts, score * scale, middle, centered, row_weight,
        row_weight / weight, item, col_groups, n, is_row, MODE,
    )  # fmt: skip
    col_loss, col_term, col_target = _finish_side(
        totals, n.to(tl.int64), col_parts, col_positives, col_counts, score * scale, middle, centered, col_weight,
        col_weight / weight, item, row_groups, m, is_col, MODE,
    )  # fmt: skip
    tl.store(row_terms + item, row_term, mask=is_row)
    tl.store(col_terms + item, col_term, mask=is_col)
    tl.store(row_targets + item, row_target, mask=is_row)
    tl.store(col_targets + item, col_target, mask=is_col)
    loss = tl.where(is_row, row_loss, 0.0) + tl.where(is_col, col_loss, 0.0)
    tl.store(losses + tl.program_id(0), tl.sum(loss, 0) * HALF_LN2)
    if MODE != 1:
        whole = tl.exp2(score * scale - row_term) + tl.exp2(score * scale - col_term)
        if centered:
            whole = tl.exp2(score * scale - middle) * (row_term + col_term)
        targets = row_target + col_target
        tl.store(on_diagonal + item, whole - targets, mask=is_row)
        beside = tl.where(is_row, targets * score, 0.0)
        tl.store(besides + tl.program_id(0), tl.sum(beside, 0))
    if tl.program_id(0) == 0:
        tl.store(center_used, middle)
        tl.store(unit, weight / (2.0 * GAIN))


@triton.jit
def _write_kernel(product, grad, unit, logit_scale, out, product_row, out_row, width, BLOCK: tl.constexpr):
    """``product * grad * unit * logit_scale``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    factor = tl.load(grad).to(tl.float32) * tl.load(unit) * tl.load(logit_scale).to(tl.float32)
    value = tl.load(product + row * product_row + column, mask=live) * factor
    tl.store(out + row * out_row + column, value.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["parts", "others"])
def _scale_kernel(scale_parts, besides, grad, unit, out, parts, others, BLOCK: tl.constexpr):
    """The gradient of the logit scale, ``grad * unit`` times the sum of ``scale_parts`` less that of ``besides``."""
    offset = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        total += tl.load(scale_parts + first + offset, mask=first + offset < parts, other=0.0)
    for first in range(0, others, BLOCK):
        total -= tl.load(besides + first + offset, mask=first + offset < others, other=0.0)
    value = tl.sum(total, 0) * (tl.load(grad).to(tl.float32) * tl.load(unit))
    tl.store(out, value.to(out.dtype.element_ty))


@triton.jit(
    do_not_specialize=["n", "m", "units", "first_row", "last_row", "grad_row"],
    do_not_specialize_on_alignment=["scale_parts"],  # from where the parts of earlier chunks end
)
def _gradient_kernel(
    a, b, logit_scale, center, row_terms, col_terms, row_target, col_target, image_ids, text_ids, grad, scale_parts,
    n, m, units, a_row, a_unit, b_row, b_unit, first_row, last_row, grad_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Rows ``first_row`` to ``last_row`` of the gradient of the logits, and a part of its sum times the scores.

    ``gradient = 2^(logit - row_term) + 2^(logit - col_term)``, or with a finite ``center``
    ``2^(logit - center) * (row_term + col_term)``, less ``row_target + col_target`` where ids say what is positive.
    """
    row_blocks = tl.cdiv(last_row - first_row, ROWS)
    col_blocks = tl.cdiv(m, COLS)
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    shift = tl.load(center)
    centered = shift < float("inf")
    dead = tl.where(centered, 0.0, float("inf"))
    stride = tl.multiple_of(grad_row.to(tl.int64), 16)
    by_row = tl.zeros((ROWS, 4), tl.float32)
    program = tl.program_id(0)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 4)
    for tile in tl.range(program, row_blocks * col_blocks, tl.num_programs(0), flatten=FLATTEN):
        local, first_col = tile_origin(tile, row_blocks, col_blocks, ROWS, COLS, GROUP)
        row = first_row + local
        scores = tile_product(
            a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        row_live = r < last_row - row
        row_term = tl.load(row_terms + row + r, mask=row_live, other=dead)
        if MODE != 0:
            special = _special(image_ids, text_ids, row, first_col, n, m, ROWS, COLS)
        tile_rows = tl.zeros((ROWS, 4), tl.float32)
        parts = quarters(scores)
        for part in tl.static_range(4):
            col = first_col + part * (COLS // 4)
            col_live = c < m - col
            score = parts[part]
            col_term = tl.load(col_terms + col + c, mask=col_live, other=dead)
            if centered:
                gradient = tl.exp2(score * scale - shift) * (row_term[:, None] + col_term[None, :])
            else:
                gradient = tl.exp2(score * scale - row_term[:, None]) + tl.exp2(score * scale - col_term[None, :])
                gradient = tl.where(col_live[None, :], gradient, 0.0)
            if MODE != 0:  # noqa: SIM102 (a constexpr with others would not keep the body from being compiled)
                if special:
                    same = _same(image_ids, text_ids, row, col, n, m, ROWS, COLS // 4, MODE)
                    if MODE == 2:
                        gradient = tl.where(same, 0.0, gradient)
                    else:
                        target = tl.load(row_target + row + r, mask=row_live, other=0.0)[:, None]
                        target += tl.load(col_target + col + c, mask=col_live, other=0.0)[None, :]
                        gradient = tl.where(same, gradient - target, gradient)
            if TMA:  # what lies outside is not stored, and columns there have scores of 0
                tile_rows += sum_own_cols(gradient * score)
                grad.store([local.to(tl.int32), col.to(tl.int32)], gradient.to(grad.dtype))
            else:
                gradient = tl.where(row_live[:, None] & col_live[None, :], gradient, 0.0)
                tile_rows += sum_own_cols(gradient * score)
                out = grad + local * stride + col + r[:, None] * stride + c[None, :]
                inside = row_live[:, None] & (c < stride - col)[None, :]
                tl.store(out, gradient.to(grad.dtype.element_ty), mask=inside)
        by_row += tl.where(row_live[:, None], tile_rows, 0.0)
    tl.store(scale_parts + program, tl.sum(tl.sum(by_row, 1), 0))


def _ordinals(image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as int32 from 0 in the same order: half the registers to compare."""
    every = torch.cat([image_ids, text_ids]).sort().values
    return torch.searchsorted(every, image_ids, out_int32=True), torch.searchsorted(every, text_ids, out_int32=True)


def _counts(ids: Tensor, among: Tensor) -> Tensor:
    """How often each of ``ids`` occurs in ``among``, without a synchronisation."""
    among = among.sort().values
    return torch.searchsorted(among, ids, right=True) - torch.searchsorted(among, ids)


def _weights(row_counts: Tensor, col_counts: Tensor) -> Tensor:
    """``(2,)``: one over the number of rows, and of columns, that have positives."""
    owned = torch.stack([(row_counts > 0).sum(), (col_counts > 0).sum()])
    return 1.0 / owned.clamp(min=1).to(torch.float32)


class Saved(NamedTuple):
    """What the forward leaves to the backward, whose G is the gradient to the products; see the kernels."""

    row_terms: Tensor  # (N,)
    col_terms: Tensor  # (M,)
    row_targets: Tensor  # (N,)
    col_targets: Tensor  # (M,)
    on_diagonal: Tensor  # (N,), of G; of none where ids say what is positive
    besides: Tensor  # (parts,), what was taken off there times the scores
    center: Tensor  # ()
    unit: Tensor  # (), what G is a multiple of


def _saved_shapes(n: int, m: int, mode: int) -> tuple[tuple[int, ...], ...]:
    on_diagonal, besides = (0, 0) if mode == POSITIVE else (n, cdiv(max(n, m), FINISH_BLOCK))
    return (n,), (m,), (n,), (m,), (on_diagonal,), (besides,), (), ()


@op("contrastive_forward")
def contrastive_forward(
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and :class:`Saved`."""
    n, m = image_units.shape[0], folded_text_units.shape[0]
    device = image_units.device
    finishing = cdiv(max(n, m), FINISH_BLOCK)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    saved = Saved(*(empty(*shape) for shape in _saved_shapes(n, m, mode)))
    if not n or not m:
        return empty().zero_(), *(x.zero_() for x in saved)
    with on_device_of(image_units):
        plan = make_plan(image_units, folded_text_units, sweep=True)
        row_groups, col_groups = sweeps(plan)
        grid = row_groups * col_groups, 1, 1
        constants = {"MODE": mode, **plan.constants, **launch_options(plan.config)}
        sizes = (*plan.sizes, row_groups, col_groups)
        centered = n * m >= CENTERED_FROM
        diagonal, guess = paired_scores(plan, logit_scale * LOG2E.value if centered else None)
        row_positives = col_positives = row_counts = col_counts = weights = totals = bad = None
        if mode == POSITIVE:
            row_positives = torch.zeros(col_groups, n, dtype=torch.float32, device=device)
            col_positives = torch.zeros(row_groups, m, dtype=torch.float32, device=device)
            row_counts, col_counts = _counts(image_ids, text_ids), _counts(text_ids, image_ids)
            weights = _weights(row_counts, col_counts)
        if centered:
            zeros = torch.zeros(4 + col_groups * n, dtype=torch.float32, device=device)
            bad, row_sums = zeros[:1], zeros[4:]  # both aligned
            col_sums, totals = empty(row_groups, m), empty(n + m)
            launch(
                _sums_kernel, grid,
                (
                    *plan.operands, logit_scale, guess, image_ids, text_ids, row_sums, col_sums, row_positives,
                    col_positives, *sizes,
                ),
                {"WARPS": plan.warps, "FLATTEN": plan.flatten and mode == DIAGONAL, **constants},
            )  # fmt: skip
            launch(
                _total_kernel, (cdiv(n + m, FINISH_BLOCK), 1, 1),
                (row_sums, col_sums, guess, totals, bad, n, m, row_groups, col_groups),
                {"BLOCK": FINISH_BLOCK, "num_warps": 4},
            )  # fmt: skip
        row_parts, col_parts = empty(2, col_groups, n), empty(2, row_groups, m)
        launch(
            _online_kernel, grid,
            (
                *plan.operands, logit_scale, bad, image_ids, text_ids, row_parts, col_parts, row_positives,
                col_positives, *sizes,
            ),
            constants,
        )  # fmt: skip
        losses = empty(finishing) if finishing > 1 else empty()
        launch(
            _finish_kernel, (finishing, 1, 1),
            (
                logit_scale, guess, bad, totals, row_parts, col_parts, row_positives, col_positives, row_counts,
                col_counts, diagonal, weights, losses, *saved, n, m, row_groups, col_groups,
            ),
            {"MODE": mode, "BLOCK": FINISH_BLOCK, "num_warps": 4},
        )  # fmt: skip
        return losses.sum() if finishing > 1 else losses, *saved


@contrastive_forward.register_fake
def _(image_units, folded_text_units, logit_scale, image_ids, text_ids, mode):
    n, m = image_units.shape[0], folded_text_units.shape[0]
    return tuple(image_units.new_empty(s, dtype=torch.float32) for s in ((), *_saved_shapes(n, m, mode)))


@op("contrastive_backward")
def contrastive_backward(
    grad: Tensor,
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mode: int,
    saved: list[Tensor],
    needs_image: bool,
    needs_text: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image units, text units (of no rows where not needed) and logit scale."""
    n, units = image_units.shape
    m = folded_text_units.shape[0]
    grad_image, grad_text = (
        padded_rows(count if needed else 0, units, image_units.dtype, image_units.device)
        for count, needed in ((n, needs_image), (m, needs_text))
    )
    if not n or not m:
        return grad_image.zero_(), grad_text.zero_(), torch.zeros_like(logit_scale)
    with on_device_of(image_units):
        plan = make_plan(image_units, folded_text_units, sweep=True)
        images, texts = plan.tensors
        known = Saved(*saved)
        factors = grad, known.unit, logit_scale
        rows = _chunk(plan)
        scratch = padded_rows(min(n, rows), m, image_units.dtype, image_units.device)
        scale_parts = image_units.new_empty(cdiv(n, rows) * plan.programs, dtype=torch.float32)
        parts = 0
        text_total = None
        for first in range(0, n, rows):
            last = min(n, first + rows)
            gradient = scratch[: last - first]
            programs = min(plan.programs, cdiv(last - first, plan.config.rows) * plan.col_blocks)
            launch(
                _gradient_kernel, (programs, 1, 1),
                (
                    *plan.operands, logit_scale, known.center, known.row_terms, known.col_terms, known.row_targets,
                    known.col_targets, image_ids, text_ids, output(plan, gradient), scale_parts[parts:], *plan.sizes,
                    first, last, scratch.stride(0),
                ),
                {
                    "MODE": mode, "GROUP": GROUP, "FLATTEN": plan.flatten and mode == DIAGONAL, **plan.constants,
                    **launch_options(plan.config),
                },
            )  # fmt: skip
            parts += programs
            if mode != POSITIVE:
                gradient.diagonal(first).copy_(known.on_diagonal[first:last])
            if needs_image:
                _write(_product(gradient, widened(texts)), factors, grad_image[first:last])
            if needs_text:
                text_total = _product(gradient.mT, widened(images[first:last]), text_total)
        if text_total is not None:
            _write(text_total, factors, grad_text)
        grad_scale = torch.empty_like(logit_scale)
        launch(
            _scale_kernel, (1, 1, 1),
            (scale_parts, known.besides, grad, known.unit, grad_scale, parts, known.besides.numel()),
            {"BLOCK": SCALE_BLOCK, "num_warps": 4},
        )  # fmt: skip
        return grad_image, grad_text, grad_scale


@contrastive_backward.register_fake
def _(grad, image_units, folded_text_units, logit_scale, *args):
    needs_image, needs_text = args[-2:]
    (n, units), m = image_units.shape, folded_text_units.shape[0]
    return (
        padded_rows(n if needs_image else 0, units, image_units.dtype, image_units.device),
        padded_rows(m if needs_text else 0, units, image_units.dtype, image_units.device),
        torch.empty_like(logit_scale),
    )


def _chunk(plan: Plan) -> int:
    """Rows of the gradient of the logits at a time.

    As many row blocks as a quarter of the multiprocessors, or a multiple: with a number of column blocks that four
    divides, as many tiles as fill the last round. So do those of the product that makes the image gradient, of some
    1,024 columns.
    """
    quarter = max(1, plan.programs // 4) * plan.config.rows
    return cdiv(CHUNK, quarter) * quarter


def _write(product: Tensor, factors: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    """``product`` times all ``factors`` into ``out``, of as many columns or fewer.

    Into what lies between its rows too, where there is a product for it: whole vectors are written sooner.
    """
    whole = widened(out)
    out = whole if whole.shape == product.shape else out
    n, width = out.shape
    block = min(1024, next_power_of_2(width))
    launch(
        _write_kernel, (n, cdiv(width, block), 1),
        (product, *factors, out, product.stride(0), out.stride(0), width),
        {"BLOCK": block, "num_warps": max(1, block // 256)},
    )  # fmt: skip


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
        saved,
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
    """
    mode = DIAGONAL
    if image_ids is None or same_owner == "negative":
        image_ids = text_ids = None
    else:
        mode = POSITIVE if same_owner == "positive" else IGNORE
        image_ids, text_ids = _ordinals(image_ids.contiguous(), text_ids.contiguous())
    return contrastive_forward(image_units, folded_text_units, logit_scale, image_ids, text_ids, mode)[0]


def compile_cases() -> list[CompileCase]:
    n, units, chunk = 32_768, 1_022, 8_448
    variants: list[tuple[str, dict[str, Any]]] = [
        ("diagonal", {"MODE": DIAGONAL, "image_ids": None, "text_ids": None}),
        ("positive", {"MODE": POSITIVE}),
        ("ignore", {"MODE": IGNORE}),
    ]
    ids = {"image_ids": "*i32", "text_ids": "*i32", "logit_scale": "*fp32"}
    groups = {"row_groups": "i32", "col_groups": "i32"}
    positives = ("row_positives", "col_positives")

    def of(kernel: Any) -> list[tuple[str, dict[str, Any]]]:
        """The variants as the launchers run ``kernel``."""
        found = []
        for name, extra in variants:
            if "row_positives" in kernel.arg_names and name != "positive":
                extra = extra | dict.fromkeys(positives)
            if "FLATTEN" in kernel.arg_names and name != "diagonal":
                extra = extra | {"FLATTEN": False}
            if "GROUP" in kernel.arg_names:
                extra = extra | {"GROUP": GROUP}
            found.append((name, extra))
        if kernel is _online_kernel:
            found += [(f"small_{name}", extra | {"bad": None}) for name, extra in found]
        return found

    sums, online = (
        tile_cases(
            f"contrastive_{name}_32k",
            kernel,
            {**ids, **groups, **dict.fromkeys((known, *results, *positives), "*fp32")},
            of(kernel),
            lambda itemsize: (2.0 * n * n * units, itemsize * 2.0 * n * units),
            divisible=(*results, *positives),
            sweep=True,
        )
        for name, kernel, known, results in (
            ("sums", _sums_kernel, "center", ("row_sums", "col_sums")),
            ("online", _online_kernel, "bad", ("row_parts", "col_parts")),
        )
    )
    sides = dict.fromkeys(
        ("center", "row_terms", "col_terms", "row_target", "col_target", "scale_parts"), "*fp32"
    )
    gradient = tile_cases(
        "contrastive_gradient_8k_x_32k",
        _gradient_kernel,
        {**ids, **sides, "grad": "OUT", "first_row": "i32", "last_row": "i32", "grad_row": "i32"},
        of(_gradient_kernel),
        lambda itemsize: (2.0 * chunk * n * units, itemsize * (1.0 * (chunk + n) * units + chunk * n)),
        divisible=("row_terms", "col_terms", "row_target", "col_target", "grad"),
        sweep=True,
    )

    def small(name: str, kernel: Any, constants: dict[str, Any], moved: float) -> CompileCase:
        numbers = dict.fromkeys(("n", "m", "row_groups", "col_groups"), "i32")
        counts = dict.fromkeys(("row_counts", "col_counts"), "*i64")
        pointers = {arg: counts.get(arg, "*fp32") for arg in kernel.arg_names if arg not in (*numbers, *constants)}
        return CompileCase(
            name, kernel, {**pointers, **numbers}, constants, 4, 3, tuple(arg for arg in pointers if arg != "bad"),
            flops=10.0 * moved, bytes=moved, precision="fp32",
        )  # fmt: skip

    block = {"BLOCK": FINISH_BLOCK}
    unused = dict.fromkeys((*positives, "row_counts", "col_counts", "weights"))
    uncentered = dict.fromkeys(("center", "bad", "totals"))
    factors = {"grad": "*fp32", "unit": "*fp32", "logit_scale": "*fp32"}
    return [
        *sums, *online, *gradient,
        small("total_32k", _total_kernel, block, 4.0 * (132 + 2) * n),
        *(
            small(f"finish_32k_{name}", _finish_kernel, {**block, **unused, "MODE": mode}, 40.0 * n)
            for name, mode in (("diagonal", DIAGONAL), ("ignore", IGNORE))
        ),
        small("finish_32k_positive", _finish_kernel, {**block, "MODE": POSITIVE}, 40.0 * n),
        *(
            small(f"finish_1k_{name}", _finish_kernel, {**block, **rest, **uncentered, "MODE": mode}, 40.0 * 1024)
            for name, rest, mode in (
                ("diagonal", unused, DIAGONAL), ("ignore", unused, IGNORE), ("positive", {}, POSITIVE)
            )
        ),
        CompileCase(
            "write_32k", _write_kernel,
            {
                "product": "*fp32", **factors, "out": "*bf16",
                "product_row": "i32", "out_row": "i32", "width": "i32",
            },
            {"BLOCK": 1024}, 4, 3, ("product", *factors, "out", "product_row", "out_row", "width"),
            flops=1.0 * n * units, bytes=6.0 * n * units, precision="fp32",
        ),
        CompileCase(
            "scale_32k", _scale_kernel,
            {
                "scale_parts": "*fp32", "besides": "*fp32", "grad": "*fp32", "unit": "*fp32", "out": "*fp32",
                "parts": "i32", "others": "i32",
            },
            {"BLOCK": SCALE_BLOCK}, 4, 3, ("scale_parts", "besides", "grad", "unit", "out"),
            flops=656.0, bytes=4.0 * 656, precision="fp32",
        ),
    ]  # fmt: skip
