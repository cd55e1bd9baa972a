"""Adaptive selection: each row's largest entries as short lists, by row and by column, without sorting.

The row keeps entries >= its 2nd largest value (after its l2 norm), so mostly two, but any number when values tie.
Lists have room for whole rows and a count each; slots beyond the count hold zeros. All rows of all levels go in one
launch, all columns in a second.

Paper, d=512, s=2, L=8: 174,760 weights, 0.7 MB read and 3.5 MB written, 0.9 us on an H200 (4.8 TB/s); two launches
and the gathering of the weights into one buffer cost more than the bytes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast import reference
from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import next_power_of_2, on_device_of
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op

EPS = tl.constexpr(reference.aggregate.EPS)


class Selection(NamedTuple):
    """What the rows of all levels select, for weights ``(d_l, d_{l-1})``, l = 1..L, level after level.

    A level's lists are stored slot by slot: slot k of row i of level l is at ``start_l + k * d_l + i``, that of column
    j at ``start_l + k * d_{l-1} + j``, with ``start_l`` the number of weights of the levels before. It is a snapshot:
    make another when a weight has changed. It has no gradient; :func:`aggregate_adaptive` brings it to the weights.
    """

    weights: Tensor  # (sum d_l * d_{l-1},) float32: the weights as they were
    columns: Tensor  # int32, like weights: columns selected by a row, in ascending order
    values: Tensor  # float32: the row's entries there, divided by its norm
    counts: Tensor  # (sum d_l,) int32: columns selected by each row
    back_rows: Tensor  # int32, like weights: rows that selected a column (with a value other than 0)
    back_values: Tensor  # float32: their values
    back_counts: Tensor  # (sum d_{l-1},) int32


@triton.jit
def locate(index, SIZES: tl.constexpr, OTHERS: tl.constexpr):
    """The level to which each ``index`` belongs when levels of ``SIZES`` follow each other: its size, the other side's,
    the first index of the level, and where its ``sizes * others`` matrix starts."""
    size = index * 0 + SIZES[0]
    other = index * 0 + OTHERS[0]
    first = index * 0
    start = index * 0
    next_first = SIZES[0]
    next_start = SIZES[0] * OTHERS[0]
    for level in tl.static_range(1, len(SIZES)):
        reached = index >= next_first
        size = tl.where(reached, SIZES[level], size)
        other = tl.where(reached, OTHERS[level], other)
        first = tl.where(reached, next_first, first)
        start = tl.where(reached, next_start, start)
        next_first += SIZES[level]
        next_start += SIZES[level] * OTHERS[level]
    return size, other, first, start


@triton.jit
def _partition(keep, entries):
    """Slot of each entry when those kept come first, and how many are kept."""
    rank = tl.cumsum(keep.to(tl.int32), 0)
    count = tl.sum(keep.to(tl.int32), 0)
    return tl.where(keep, rank - 1, count + entries - rank), count


@triton.jit
def _select_rows(
    weights_ptr, selected_ptr, columns_ptr, values_ptr, counts_ptr,
    ROW_DIMS: tl.constexpr, COLUMN_DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its lists, and the row itself with what it did not select set to 0."""
    row = tl.program_id(0).to(tl.int64)
    rows, width, first, start = locate(row, ROW_DIMS, COLUMN_DIMS)
    entries = tl.arange(0, BLOCK)
    valid = entries < width
    offsets = start + (row - first) * width + entries
    w = tl.load(weights_ptr + offsets, mask=valid, other=0.0)
    # IEEE square root and division: as in torch, so that rounding makes and breaks the same ties.
    norm = tl.sqrt_rn(tl.sum(w * w, 0))
    m = tl.div_rn(w, tl.zeros_like(w) + (norm + EPS))
    ranked = tl.where(valid, m, float("-inf"))
    largest = tl.max(ranked, 0)
    alone = (tl.sum((ranked == largest).to(tl.int32), 0) == 1) & (width > 1)
    second = tl.max(tl.where(ranked == largest, float("-inf"), ranked), 0)
    keep = valid & ((ranked < tl.where(alone, second, largest)) == 0)  # NaN shows
    kept = tl.where(keep, m, 0.0)
    slot, count = _partition(keep, entries)
    tl.store(selected_ptr + offsets, kept, mask=valid)
    tl.store(counts_ptr + row, count)
    slots = start + slot * rows + (row - first)
    tl.store(columns_ptr + slots, entries, mask=valid)
    tl.store(values_ptr + slots, kept, mask=valid)


@triton.jit
def _select_columns(
    selected_ptr, rows_ptr, values_ptr, counts_ptr,
    COLUMN_DIMS: tl.constexpr, ROW_DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One column: the rows that selected it."""
    column = tl.program_id(0).to(tl.int64)
    columns, height, first, start = locate(column, COLUMN_DIMS, ROW_DIMS)
    entries = tl.arange(0, BLOCK)
    valid = entries < height
    m = tl.load(selected_ptr + start + entries * columns + (column - first), mask=valid, other=0.0)
    slot, count = _partition(m != 0, entries)
    tl.store(counts_ptr + column, count)
    slots = start + slot * columns + (column - first)
    tl.store(rows_ptr + slots, entries, mask=valid)
    tl.store(values_ptr + slots, m, mask=valid)


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def adaptive_dims(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Sizes d_0..d_L of weights ``(d_l, d_{l-1})``; an error if they do not chain."""
    dims = (int(weights[0].shape[1]), *(int(weight.shape[0]) for weight in weights))
    if any(tuple(weight.shape) != (dims[level + 1], dims[level]) for level, weight in enumerate(weights)):
        raise ValueError(f"weights do not chain: shapes {[tuple(weight.shape) for weight in weights]}")
    return dims


def _sizes(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns of each level's weights, which need not chain."""
    return tuple(int(weight.shape[0]) for weight in weights), tuple(int(weight.shape[1]) for weight in weights)


def _empty_selection(weights: Sequence[Tensor]) -> list[Tensor]:
    rows, columns = _sizes(weights)
    device = weights[0].device
    total = sum(r * c for r, c in zip(rows, columns, strict=True))

    def lists(lengths: tuple[int, ...]) -> list[Tensor]:
        return [
            torch.empty(total, dtype=torch.int32, device=device),
            torch.empty(total, dtype=torch.float32, device=device),
            torch.empty(sum(lengths), dtype=torch.int32, device=device),
        ]

    return [torch.empty(total, dtype=torch.float32, device=device), *lists(rows), *lists(columns)]


@op("select")
def _select(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = _sizes(weights)
    flat, columns_out, values, counts, back_rows, back_values, back_counts = _empty_selection(weights)
    if flat.numel():
        torch.cat([weight.reshape(-1) for weight in weights], out=flat)
        selected = torch.empty_like(flat)
        with on_device_of(flat):
            block = next_power_of_2(max(columns))
            dims = {"ROW_DIMS": rows, "COLUMN_DIMS": columns}
            launch(
                _select_rows, (sum(rows), 1, 1), (flat, selected, columns_out, values, counts),
                {**dims, "BLOCK": block, "num_warps": _warps(block)},
            )  # fmt: skip
            block = next_power_of_2(max(rows))
            launch(
                _select_columns, (sum(columns), 1, 1), (selected, back_rows, back_values, back_counts),
                {**dims, "BLOCK": block, "num_warps": _warps(block)},
            )  # fmt: skip
    return flat, columns_out, values, counts, back_rows, back_values, back_counts


@_select.register_fake
def _(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_empty_selection(weights))


def select(weights: Sequence[Tensor]) -> Selection:
    """What each row of the weights ``(d_l, d_{l-1})`` of levels 1..L selects, in float32; no gradient, no host sync.

    It stays valid until a weight changes, so callers may keep it.
    """
    adaptive_dims(weights)
    return Selection(*_select([weight.detach() for weight in weights]))


@torch.no_grad()
def select_both(images: Sequence[Tensor], texts: Sequence[Tensor]) -> tuple[Selection, Selection]:
    """:func:`select` of weights of the same shapes, plain tensors all, at once."""
    halves = zip(*(both.chunk(2) for both in _select.run([*images, *texts])), strict=True)
    first, second = (Selection(*half) for half in halves)
    return first, second


def compile_cases() -> list[CompileCase]:
    """The paper's selection (d=512, s=2, L=8)."""
    dims = tuple(512 >> level for level in range(9))
    rows, columns = dims[1:], dims[:-1]
    weights = sum(r * c for r, c in zip(rows, columns, strict=True))
    lists = {"values_ptr": "*fp32", "counts_ptr": "*i32"}
    by_row = {"weights_ptr": "*fp32", "selected_ptr": "*fp32", "columns_ptr": "*i32", **lists}
    by_column = {"selected_ptr": "*fp32", "rows_ptr": "*i32", **lists}
    return [
        CompileCase(
            "select_rows_512", _select_rows, by_row,
            {"ROW_DIMS": rows, "COLUMN_DIMS": columns, "BLOCK": 512}, _warps(512), 3, divisible=tuple(by_row),
            bytes=16 * weights, precision="fp32",
        ),
        CompileCase(
            "select_columns_512", _select_columns, by_column,
            {"COLUMN_DIMS": columns, "ROW_DIMS": rows, "BLOCK": 256}, _warps(256), 3, divisible=tuple(by_column),
            bytes=12 * weights, precision="fp32",
        ),
    ]  # fmt: skip
