"""Retrieval ranks both ways without the matrix: scores of the positives first, then one counting pass.

A positive counted again is bitwise the score it is compared with (see `paired`), so a tie is a tie. A program walks
down columns and keeps what it counts for them in registers, each thread for its own rows; rows are counted by an
atomic each and tile. Counts are integers, so adding them atomically is deterministic.

Paper: 2 N M U FLOP and (N + M) U read. COCO 5K (5,000 x 25,000 x 1,022, bf16): 255 GFLOP, 323 us at 790 TFLOP/s, and
61 MB, 13 us at 4.8 TB/s: bound by arithmetic. On top of its 16,384 cycles of wgmma a tile of
256 x 128 takes some 800 instructions a warp, of which 512 compare and count: 1,600 cycles that nothing overlaps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import cdiv, on_device_of
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.paired import score_owned
from esl_fast.kernels.plan import launch_options, make_plan, sweeps, tile_cases, unsigned_nan
from esl_fast.kernels.tile import quarters, sum_own_cols, sum_own_rows, sweep_length, sweep_origin, tile_product

START_BLOCK = 1024


@triton.jit
def _below(score, bar, SIGNS: tl.constexpr):
    """1 where ``score < bar``, for any score, NaN too, and a bar that is finite or -inf.

    A comparison whose result is added up takes four instructions. The sign of the difference takes two, where
    infinity less infinity and whatever is NaN give a NaN without a sign.
    """
    if SIGNS:
        return ((score - bar).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    return (score < bar).to(tl.int32)


@triton.jit(do_not_specialize=["n", "m"])
def _start_kernel(best, image_ranks, text_ranks, n, m, BLOCK: tl.constexpr):
    """Where counting starts: no best score yet, images rank M, texts rank N - 1; whatever lies below lowers a rank."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(best + item, float("-inf"), mask=item < n)
    tl.store(image_ranks + item, m.to(tl.int64) + item * 0, mask=item < n)
    tl.store(text_ranks + item, n.to(tl.int64) - 1 + item * 0, mask=item < m)


@triton.jit(do_not_specialize=["n", "m", "units", "row_groups", "col_groups"])
def _count_kernel(
    a, b, row_bars, col_bars, row_ranks, col_ranks, n, m, units, a_row, a_unit, b_row, b_unit, row_groups, col_groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr, SIGNS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Take off each rank how many scores of the row or column lie below its bar. Bars are padded to whole tiles."""
    row_group = tl.program_id(0) // col_groups
    col_group = tl.program_id(0) % col_groups
    sweep = sweep_length(tl.cdiv(n, ROWS), row_group, row_groups)
    tiles = sweep * sweep_length(tl.cdiv(m, COLS), col_group, col_groups)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 4)
    zeros = tl.zeros((8 * WARPS, COLS // 4), tl.int32)
    first = zeros
    second = zeros
    third = zeros
    fourth = zeros
    for tile in tl.range(0, tiles, flatten=FLATTEN):
        row, col = sweep_origin(tile, sweep, row_group, col_group, row_groups, col_groups, ROWS, COLS)
        scores = tile_product(
            a, b, row, col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        row_live = r < tl.minimum(n - row, ROWS).to(tl.int32)
        row_bar = tl.load(row_bars + row + r)
        row_parts = tl.zeros((ROWS, 4), tl.int32)
        parts = quarters(scores)
        for part in tl.static_range(4):
            first_col = col + part * (COLS // 4)
            score = parts[part]
            if not TMA:
                col_live = c < tl.minimum(m - first_col, COLS).to(tl.int32)
                score = tl.where(row_live[:, None] & col_live[None, :], score, float("inf"))
            col_bar = tl.load(col_bars + first_col + c)
            col_below = sum_own_rows(_below(score, col_bar[None, :], SIGNS), WARPS)
            if part == 0:
                first += col_below
            elif part == 1:
                second += col_below
            elif part == 2:
                third += col_below
            else:
                fourth += col_below
            row_parts += sum_own_cols(_below(score, row_bar[:, None], SIGNS))
        row_below = tl.sum(row_parts, 1)
        if TMA:  # columns past the last scored 0
            row_below -= tl.where(row_bar > 0.0, tl.maximum(col + COLS - m, 0).to(tl.int32), 0)
        tl.atomic_add(row_ranks + row + r, -row_below.to(tl.int64), mask=row_live, sem="relaxed")
        last = tile % sweep == sweep - 1
        if last:
            for part in tl.static_range(4):
                total = first if part == 0 else second if part == 1 else third if part == 2 else fourth
                first_col = col + part * (COLS // 4)
                counts = tl.sum(total, 0)
                if TMA:  # so did rows
                    col_bar = tl.load(col_bars + first_col + c)
                    counts -= tl.where(col_bar > 0.0, tl.maximum(row + ROWS - n, 0).to(tl.int32), 0)
                col_live = c < tl.minimum(m - first_col, COLS).to(tl.int32)
                tl.atomic_add(col_ranks + first_col + c, -counts.to(tl.int64), mask=col_live, sem="relaxed")
        going_on = 1 - last.to(tl.int32)  # a product: selecting zeros here crashes Triton 3.6
        first *= going_on
        second *= going_on
        third *= going_on
        fourth *= going_on


@op("retrieval_ranks")
def retrieval_ranks(image_units: Tensor, folded_text_units: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of image-to-text ``(N,)`` and text-to-image ``(M,)``, int64, as ``reference.ranks`` defines them.

    ``image_units (N, U)`` and ``folded_text_units (M, U)`` of one dtype (float32, bfloat16 or float16, any strides),
    compared in float32; ``owners (M,)`` integer image indices below N, in any order (sorted is fastest).
    An image without captions ranks M. NaN counts as reaching what it is compared with, and an item whose own positive
    is not finite, or whose owner is no image, ranks last (M - 1 or N - 1): what is broken does not pass for good.
    """
    n, m = image_units.shape[0], folded_text_units.shape[0]
    if not n or not m:
        return owners.new_full((n,), m, dtype=torch.int64), owners.new_zeros(m, dtype=torch.int64)
    with on_device_of(image_units):
        owners = owners.long().contiguous()
        plan = make_plan(image_units, folded_text_units, sweep=True)
        config = plan.config
        image_ranks, text_ranks = (torch.empty(k, dtype=torch.int64, device=owners.device) for k in (n, m))
        best, positives = (
            torch.empty(blocks * size, dtype=torch.float32, device=owners.device)
            for blocks, size in ((plan.row_blocks, config.rows), (plan.col_blocks, config.cols))
        )
        launch(
            _start_kernel, (cdiv(max(n, m), START_BLOCK), 1, 1), (best, image_ranks, text_ranks, n, m),
            {"BLOCK": START_BLOCK, "num_warps": 4},
        )  # fmt: skip
        score_owned(plan, owners, positives, best, image_ranks)
        row_groups, col_groups = sweeps(plan)
        launch(
            _count_kernel, (row_groups * col_groups, 1, 1),
            (*plan.operands, best, positives, image_ranks, text_ranks, *plan.sizes, row_groups, col_groups),
            {
                "WARPS": plan.warps, "SIGNS": unsigned_nan(image_units.device), "FLATTEN": plan.flatten,
                **plan.constants, **launch_options(config),
            },
        )  # fmt: skip
        return image_ranks, text_ranks


@retrieval_ranks.register_fake
def _(image_units, folded_text_units, owners):
    n, m = image_units.shape[0], folded_text_units.shape[0]
    return owners.new_empty(n, dtype=torch.int64), owners.new_empty(m, dtype=torch.int64)


def compile_cases() -> list[CompileCase]:
    n, m, units = 5_000, 25_000, 1_022  # COCO 5K
    pointers = {"best": "*fp32", "image_ranks": "*i64", "text_ranks": "*i64"}
    start = CompileCase(
        "start_5k",
        _start_kernel,
        {**pointers, "n": "i32", "m": "i32"},
        {"BLOCK": START_BLOCK},
        num_warps=4,
        num_stages=3,
        divisible=tuple(pointers),
        bytes=12.0 * n + 8.0 * m,
        precision="fp32",
    )
    count = tile_cases(
        "count_5k",
        _count_kernel,
        {
            **dict.fromkeys(("row_bars", "col_bars"), "*fp32"),
            **dict.fromkeys(("row_ranks", "col_ranks"), "*i64"),
            **dict.fromkeys(("row_groups", "col_groups"), "i32"),
        },
        [("", {})],
        lambda itemsize: (2.0 * n * m * units, itemsize * (n + m) * units + 8.0 * (n + m)),
        divisible=("row_bars", "col_bars", "row_ranks", "col_ranks"),
        sweep=True,
    )
    return [*count, start]
