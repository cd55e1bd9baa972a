"""Adaptive measure-units of bfloat16 embeddings for inference: all levels as one product with their composed maps.

A level is a linear map of the one before, up to a factor that its norm takes away, so each is one of the embedding as
well. Composed, the maps are no longer sparse; but tensor cores multiply by them in less time than it takes to gather
what the sparse ones select, level after level.

Rounding the maps to bfloat16 moves a vector by some 2^-9 of its usual length, as rounding its units does. That is much
where the vector is short, and among thousands of embeddings those of two or four units sometimes are: such maps alone
put single scores of 25,000 captions off by a tenth of the largest. Columns that the tile has to spare therefore
multiply what rounding took from the map to the level of four units, and smaller levels are made of that one in float32.
(float16 would not hold the maps: each level shrinks them.)

Paper, n embeddings of d=512, s=2, L=8, bf16: 2 n d (U - d) FLOP; 1 KB read and 2 KB written an embedding. 25,000
captions: 13.1 GFLOP, 17 us at 790 TFLOP/s, and 77 MB, 16 us at 4.8 TB/s, on an H200.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import INTERPRETING, cdiv, on_device_of, padded_rows
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.plan import descriptor, processors, target_of, tma_ready
from esl_fast.kernels.select import EPS, adaptive_dims, select
from esl_fast.kernels.tile import halves

TARGETS = ("sm_90", "interpreted")  # where it pays, and where it is tested without a GPU
FROM = 2560  # embeddings; of fewer, what the maps select is gathered sooner than a tile is multiplied
COLS = 256  # units of a tile: those of level 1, or those of all levels beyond
WIDTHS = (256, 512)  # of embeddings: level 1 fits a tile and ends with a box, where the other tile starts
BOX = COLS // 2  # that are written at once
RESTS = 4  # units of the level that is multiplied more exactly
ROWS, DEPTH, WARPS, STAGES = 128, 64, 8, 3


@triton.jit
def _level_norm(parts, START: tl.constexpr, END: tl.constexpr):
    """Norms of the columns from ``START`` to ``END`` of a tile that comes in parts."""
    BOX: tl.constexpr = parts[0].shape[1]
    total = tl.zeros((parts[0].shape[0],), tl.float32)
    for box in tl.static_range(len(parts)):
        if (box + 1) * BOX > START and box * BOX < END:
            part = parts[box]
            if box * BOX < START or (box + 1) * BOX > END:
                column = box * BOX + tl.arange(0, BOX)
                part = tl.where(((column >= START) & (column < END))[None, :], part, 0.0)
            total += tl.sum(part * part, 1)
    return tl.sqrt_rn(total)


@triton.jit
def _with_small(parts, small_ptr, END: tl.constexpr, RESTS: tl.constexpr, SMALLER: tl.constexpr):
    """The level of ``RESTS`` units, whose columns end before ``END``, with the rests in the last columns added, and
    after it the ``SMALLER`` units of levels beyond, by their maps ``(SMALLER, RESTS)``. All lie in one part."""
    BOX: tl.constexpr = parts[0].shape[1]
    LAST: tl.constexpr = len(parts) - 1
    HOME: tl.constexpr = (END - 1) // BOX
    column = tl.arange(0, BOX)
    at = column + (HOME * BOX - END)
    home = parts[HOME]
    units = ()
    for k in tl.static_range(RESTS):
        unit = tl.sum(tl.where((at == k - RESTS)[None, :], parts[HOME], 0.0), 1)
        unit += tl.sum(tl.where((column == BOX - RESTS + k)[None, :], parts[LAST], 0.0), 1)
        home = tl.where((at == k - RESTS)[None, :], unit[:, None], home)
        units = units + (unit,)
    for j in tl.static_range(SMALLER):
        smaller = tl.zeros_like(units[0])
        for k in tl.static_range(RESTS):
            smaller += units[k] * tl.load(small_ptr + j * RESTS + k)
        home = tl.where((at == j)[None, :], smaller[:, None], home)
    if HOME == LAST:
        return parts[0], home
    else:
        return home, parts[1]


@triton.jit
def _store_levels(
    acc, inverse, units, row, first, small_ptr,
    ENDS: tl.constexpr, RESTS: tl.constexpr, SMALLER: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Divide each level of a tile by its norm and write it to ``units``, from column ``first`` on.

    Level k of the tile has the columns from ``ENDS[k]`` to ``ENDS[k + 1]``; zeros complete the last one's box.
    ``inverse (ROWS,)`` is what the embeddings are to be multiplied by. The others as in :func:`_with_small`.
    """
    parts = halves(acc)
    BOX: tl.constexpr = parts[0].shape[1]
    if RESTS > 0:
        parts = _with_small(parts, small_ptr, ENDS[len(ENDS) - 1] - SMALLER, RESTS, SMALLER)
    factors = (inverse,)
    for level in tl.static_range(len(ENDS) - 1):
        norm = _level_norm(parts, ENDS[level], ENDS[level + 1])
        factors = factors + (inverse / (norm * inverse + EPS),)
    for box in tl.static_range(len(parts)):
        if box * BOX < ENDS[len(ENDS) - 1]:
            column = box * BOX + tl.arange(0, BOX)
            scale = tl.zeros_like(parts[box])
            for level in tl.static_range(len(ENDS) - 1):
                if ENDS[level] <= box * BOX and ENDS[level + 1] >= (box + 1) * BOX:
                    scale += factors[level + 1][:, None]
                elif ENDS[level] < (box + 1) * BOX and ENDS[level + 1] > box * BOX:
                    inside = ((column >= ENDS[level]) & (column < ENDS[level + 1]))[None, :]
                    scale = tl.where(inside, factors[level + 1][:, None], scale)
            units.store([row, first + box * BOX], (parts[box] * scale).to(units.dtype))


@triton.jit(do_not_specialize=["n"])
def _composed_kernel(
    x, maps, x_again, units, x_ptr, x_row, small_ptr, units_ptr, units_row, n,
    DIM: tl.constexpr, FIRST: tl.constexpr, BEYOND: tl.constexpr, RESTS: tl.constexpr, SMALLER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    BEYOND_EPS: tl.constexpr, NORMALIZE: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Two tiles for every ``ROWS`` embeddings, of level 1 and of all levels beyond; each also writes half of level 0.

    ``x``, ``maps`` and ``units`` are descriptors; embeddings and units come as pointers as well. ``x_again`` is ``x``:
    what a dot and others read gets a buffer too few from Triton, which then overwrites it under the dot
    (triton-lang/triton#6691).
    """
    for tile in tl.range(tl.program_id(0), 2 * tl.cdiv(n, ROWS), tl.num_programs(0), flatten=FLATTEN):
        row = tile // 2 * ROWS
        beyond = tile % 2
        acc = tl.zeros((ROWS, COLS), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        # Stages named here are for what no dot reads as well.
        for k in tl.range(0, DIM, DEPTH, num_stages=STAGES):
            a = x.load([row, k])
            b = maps.load([beyond * COLS, k])
            if NORMALIZE:
                exact = x_again.load([row, k]).to(tl.float32)
                squares += tl.sum(exact * exact, 1)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc)
        inverse = 1.0 / tl.sqrt_rn(squares) if NORMALIZE else tl.full((ROWS,), 1.0, tl.float32)
        if beyond == 0:
            _store_levels(acc, inverse, units, row, DIM, small_ptr, FIRST, 0, 0, EPS)
        else:
            _store_levels(acc, inverse, units, row, DIM + FIRST[1], small_ptr, BEYOND, RESTS, SMALLER, BEYOND_EPS)
        # Not loaded sooner: there are no registers for it beside the accumulators.
        rows = row.to(tl.int64) + tl.arange(0, ROWS)
        column = beyond * (DIM // 2) + tl.arange(0, DIM // 2)
        live = (rows < n)[:, None]
        level = tl.load(x_ptr + rows[:, None] * x_row + column[None, :], mask=live, other=0.0).to(tl.float32)
        level = (level * inverse[:, None]).to(units_ptr.dtype.element_ty)
        tl.store(units_ptr + rows[:, None] * units_row + column[None, :], level, mask=live)


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel can aggregate ``x (n, d)`` by the ``weights`` of levels 1..L, and sooner than by gathering."""
    dims = adaptive_dims(weights)
    return (
        x.shape[0] >= FROM
        and x.dtype == torch.bfloat16
        and target_of(x.device) in TARGETS
        and tma_ready(x)
        and dims[0] in WIDTHS
        and len(dims) > 2  # else half the product would be of zeros
        and all(after == before // 2 for before, after in pairwise(dims))
    )


class Maps(NamedTuple):
    """Composed maps.

    Attributes:
        wide: ``(2 * COLS, d)`` bfloat16, to level 1 and, from row ``COLS`` on, to the levels beyond down to that of
            four units; in the last rows what rounding took from the map to that one.
        small: ``(units, 4)`` float32, from that level to the smaller ones.
    """

    wide: Tensor
    small: Tensor


@torch.no_grad()
def compose(weights: Sequence[Tensor]) -> Maps:
    """Composed maps of the weights ``(d_l, d_{l-1})`` of levels 1..L."""
    selection = select(weights)
    dims = adaptive_dims(weights)
    rows, columns = dims[1:], dims[:-1]
    sizes = [r * c for r, c in zip(rows, columns, strict=True)]
    matrices = []
    for listed, values, r, c in zip(
        selection.columns.split(sizes), selection.values.split(sizes), rows, columns, strict=True
    ):
        matrix = torch.zeros(r, c, dtype=torch.float64, device=values.device)
        matrices.append(matrix.scatter_(1, listed.view(c, r).mT.long(), values.view(c, r).mT.double()))
    large = sum(r >= RESTS for r in rows)
    levels = list(accumulate(matrices[:large], lambda before, matrix: matrix @ before))
    wide = torch.zeros(2 * COLS, columns[0], dtype=torch.bfloat16, device=selection.values.device)
    wide[: rows[0]] = levels[0]
    if levels[1:]:
        beyond = torch.cat(levels[1:])
        wide[COLS : COLS + len(beyond)] = beyond
        if rows[large - 1] == RESTS:
            wide[-RESTS:] = beyond[-RESTS:] - wide[COLS + len(beyond) - RESTS : COLS + len(beyond)]
    small = list(accumulate(matrices[large:], lambda before, matrix: matrix @ before))
    return Maps(wide, torch.cat([wide.new_zeros(0, RESTS, dtype=torch.float32), *(s.float() for s in small)]))


@op("aggregate_composed")
def _aggregate_composed(x: Tensor, wide: Tensor, small: Tensor, dims: list[int], chain: str, normalize: bool) -> Tensor:
    # Of units no level is short beside the definition's epsilon; raw vectors are as short here as there. A level of
    # zeros stays one, also where it is multiplied by the inverse of a norm as short as 1e-18.
    eps = EPS.value if chain == "raw" else 1e-20
    n, width = x.shape[0], sum(dims)
    units = padded_rows(n, width, x.dtype, x.device)
    rows = descriptor(x, ROWS, DEPTH)
    padded = units.as_strided((n, units.stride(0)), units.stride())
    with on_device_of(x):
        launch(
            _composed_kernel, (min(processors(x.device), 2 * cdiv(n, ROWS)), 1, 1),
            (
                rows, descriptor(wide, COLS, DEPTH), rows, descriptor(padded, ROWS, BOX),
                x, x.stride(0), small, units, units.stride(0), n,
            ),
            {
                **_constants(tuple(dims)), "BEYOND_EPS": eps, "NORMALIZE": normalize, "UPCAST": INTERPRETING,
                "FLATTEN": not INTERPRETING, "num_warps": WARPS, "num_stages": STAGES,
            },
        )  # fmt: skip
    return units


@_aggregate_composed.register_fake
def _(x: Tensor, wide: Tensor, small: Tensor, dims: list[int], chain: str, normalize: bool) -> Tensor:
    return padded_rows(x.shape[0], sum(dims), x.dtype, x.device)


def aggregate_composed(x: Tensor, maps: Maps, dims: list[int], chain: str, normalize: bool) -> Tensor:
    """Units ``(n, U)`` of embeddings ``x (n, d)``, bfloat16, by the ``maps`` that :func:`compose` made.

    As :func:`esl_fast.kernels.aggregate.aggregate_adaptive`, but without a gradient; for what :func:`serves` allows.
    """
    return _aggregate_composed(x, *maps, dims, chain, normalize)


@cache
def _constants(dims: tuple[int, ...]) -> dict:
    return {
        "DIM": dims[0], "FIRST": (0, dims[1]),
        "BEYOND": (0, *accumulate(dims[2:])), "ROWS": ROWS, "COLS": COLS, "DEPTH": DEPTH, "STAGES": STAGES,
        "RESTS": RESTS if RESTS in dims[2:] else 0, "SMALLER": sum(dim for dim in dims[2:] if dim < RESTS),
    }  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """25,000 embeddings, s=2."""
    found = []
    for dim, levels in ((512, 8), (256, 8), (256, 2)):
        dims = tuple(dim >> level for level in range(levels + 1))
        width = sum(dims)
        signature = {
            "x": f"tensordesc<bf16[{ROWS}, {DEPTH}]>", "maps": f"tensordesc<bf16[{COLS}, {DEPTH}]>",
            "x_again": f"tensordesc<bf16[{ROWS}, {DEPTH}]>",
            "units": f"tensordesc<bf16[{ROWS}, {BOX}]>",
            "x_ptr": "*bf16", "x_row": "i32", "small_ptr": "*fp32",
            "units_ptr": "*bf16", "units_row": "i32", "n": "i32",
        }  # fmt: skip
        found.append(
            CompileCase(
                f"composed_{dim}_{levels}_levels", _composed_kernel, signature,
                {
                    **_constants(dims), "BEYOND_EPS": EPS.value,
                    "NORMALIZE": True, "UPCAST": False, "FLATTEN": True,
                },
                WARPS, STAGES, ("x_ptr", "x_row", "small_ptr", "units_ptr", "units_row"), wants_wgmma=True,
                flops=2 * 25_000 * dim * (width - dim),
                bytes=2 * 25_000 * (dim + width), targets=("sm_90",),
            )
        )  # fmt: skip
    return found
