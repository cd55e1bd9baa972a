"""Retrieval ranks both ways without the matrix: scores of the positives first, then one counting pass.

Both kernels take their tiles from the same main loop with the same plan, so a positive counted again is bitwise the
score it is compared with, and a tie is a tie. The first computes only tiles that hold a positive: with captions in
the order of their images some (N / ROWS + M / COLS) of them, in random order as many as the second. Counts are
integers, so adding them atomically is deterministic.

Paper: 2 N M U FLOP and (N + M) U read. COCO 5K (5,000 x 25,000 x 1,022, bf16): 255 GFLOP, 323 us at 790 TFLOP/s, and
61 MB, 13 us at 4.8 TB/s: bound by arithmetic. A tile of 128 x 256 adds 384 atomics to its 67 MFLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._common import on_device_of
from esl_fast.kernels.inspect import CompileCase
from esl_fast.kernels.similarity import DEVICES
from esl_fast.kernels.tile import (
    GROUP,
    check_operands,
    eighths,
    launch_options,
    make_plan,
    tile_cases,
    tile_origin,
    tile_product,
)


@triton.jit(do_not_specialize=["n", "m", "units"])
def _positive_kernel(
    a, b, owners, positives, n, m, units, a_row, a_unit, b_row, b_unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Score of each caption with its image, for the captions whose image lies in this program's row block."""
    row_blocks = tl.cdiv(n, ROWS).to(tl.int64)
    col_blocks = tl.cdiv(m, COLS).to(tl.int64)
    r = tl.arange(0, ROWS)
    all_cols = tl.arange(0, COLS)
    c = tl.arange(0, COLS // 8)
    for tile in range(tl.program_id(0).to(tl.int64), row_blocks * col_blocks, tl.num_programs(0)):
        row, first_col = tile_origin(tile, row_blocks, col_blocks, ROWS, COLS, GROUP)
        every_owner = tl.load(owners + first_col + all_cols, mask=all_cols < m - first_col, other=-1)
        if tl.max(((every_owner >= row) & (every_owner < row + ROWS)).to(tl.int32), 0) > 0:
            scores = tile_product(
                a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
                ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
            )  # fmt: skip
            parts = eighths(scores)
            for eighth in tl.static_range(8):
                col = first_col + eighth * (COLS // 8)
                owner = tl.load(owners + col + c, mask=c < m - col, other=-1)
                here = (owner >= row) & (owner < row + ROWS)
                mine = r[:, None] == (owner - row)[None, :]
                tl.store(positives + col + c, tl.sum(tl.where(mine, parts[eighth], 0.0), 0), mask=here)


@triton.jit(do_not_specialize=["n", "m", "units"])
def _count_kernel(
    a, b, row_bars, col_bars, row_counts, col_counts, n, m, units, a_row, a_unit, b_row, b_unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """How many scores of each row and column are not known to lie below its bar."""
    row_blocks = tl.cdiv(n, ROWS).to(tl.int64)
    col_blocks = tl.cdiv(m, COLS).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS // 8)
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, row_blocks * col_blocks, tl.num_programs(0), flatten=FLATTEN):
        row, first_col = tile_origin(tile, row_blocks, col_blocks, ROWS, COLS, GROUP)
        scores = tile_product(
            a, b, row, first_col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        row_live = r < n - row
        row_bar = tl.load(row_bars + row + r, mask=row_live, other=0.0)
        reached = tl.zeros((ROWS,), tl.int32)
        parts = eighths(scores)
        for eighth in tl.static_range(8):
            col = first_col + eighth * (COLS // 8)
            score = parts[eighth]
            live = row_live[:, None] & (c < m - col)[None, :]
            col_bar = tl.load(col_bars + col + c, mask=c < m - col, other=0.0)
            # Asking what lies below, a NaN score or bar counts against the model; so does a score of -inf.
            real = score > float("-inf")
            below_row = (score < row_bar[:, None]) & real
            below_col = (score < col_bar[None, :]) & real
            reached += tl.sum((live & (below_row == 0)).to(tl.int32), 1)
            col_reached = tl.sum((live & (below_col == 0)).to(tl.int32), 0)
            tl.atomic_add(col_counts + col + c, col_reached, mask=c < m - col, sem="relaxed")
        tl.atomic_add(row_counts + row + r, reached, mask=row_live, sem="relaxed")


@torch.library.custom_op("esl_fast::retrieval_ranks", mutates_args=(), device_types=DEVICES)
def retrieval_ranks(image_units: Tensor, folded_text_units: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of image-to-text ``(N,)`` and text-to-image ``(M,)``, int64, as ``reference.ranks`` defines them.

    ``image_units (N, U)`` and ``folded_text_units (M, U)`` of one dtype (float32, bfloat16 or float16, any strides),
    compared in float32; ``owners (M,)`` integer image indices below N, in any order (sorted is fastest).
    An image without captions ranks M. A score that is not finite never helps: it counts as reaching what it is
    compared with, and an item whose own positive is not finite ranks last (M - 1 or N - 1).
    Raises ValueError for other shapes or dtypes.
    """
    check_operands(image_units, folded_text_units)
    n, m = image_units.shape[0], folded_text_units.shape[0]
    if owners.shape != (m,) or owners.is_floating_point():
        raise ValueError(f"expected integer owners ({m},), got {owners.dtype} {tuple(owners.shape)}")
    if not n or not m:
        return owners.new_full((n,), m, dtype=torch.int64), owners.new_zeros(m, dtype=torch.int64)
    with on_device_of(image_units):
        owners = owners.long().contiguous()
        plan = make_plan(image_units, folded_text_units)
        programs = min(plan.programs, plan.row_blocks * plan.col_blocks)
        options = {"GROUP": GROUP, **plan.constants, **launch_options(plan.config)}
        positives = image_units.new_full((m,), torch.nan, dtype=torch.float32)
        _positive_kernel[(programs,)](*plan.operands, owners, positives, *plan.sizes, **options)

        finite = positives.isfinite()
        best = positives.new_full((n,), -torch.inf)
        best.scatter_reduce_(0, owners, torch.where(finite, positives, -torch.inf), "amax")
        row_counts = owners.new_zeros(n, dtype=torch.int32)
        col_counts = owners.new_zeros(m, dtype=torch.int32)
        _count_kernel[(programs,)](
            *plan.operands,
            best,
            torch.where(finite, positives, torch.nan),
            row_counts,
            col_counts,
            *plan.sizes,
            FLATTEN=plan.flatten,
            **options,
        )
        owned = torch.zeros_like(best, dtype=torch.bool).scatter_(0, owners, True)
        return torch.where(owned, row_counts.long() - 1, m), col_counts.long() - 1


@retrieval_ranks.register_fake
def _(image_units, folded_text_units, owners):
    n, m = image_units.shape[0], folded_text_units.shape[0]
    return owners.new_empty(n, dtype=torch.int64), owners.new_empty(m, dtype=torch.int64)


def compile_cases() -> list[CompileCase]:
    n, m, units = 5_000, 25_000, 1_022  # COCO 5K
    positive = tile_cases(
        "positive_5k",
        _positive_kernel,
        {"owners": "*i64", "positives": "*fp32"},
        [("", {"GROUP": GROUP})],
        lambda itemsize: (2.0 * 256 * m * units, itemsize * (n + m) * units + 12.0 * m),
        divisible=("owners", "positives"),
    )
    count = tile_cases(
        "count_5k",
        _count_kernel,
        {"row_bars": "*fp32", "col_bars": "*fp32", "row_counts": "*i32", "col_counts": "*i32"},
        [("", {"GROUP": GROUP})],
        lambda itemsize: (2.0 * n * m * units, itemsize * (n + m) * units + 8.0 * (n + m)),
        divisible=("row_bars", "col_bars", "row_counts", "col_counts"),
    )
    return [*positive, *count]
