"""Contribution degrees, and their folding into one side of the similarity.

The fold is a block-diagonal matrix product, tiled over all units at once: small levels share a tile. The matrices D_k
are first packed, for each tile of output columns, into the band of input columns that its levels span, with zeros
elsewhere; the product is then an ordinary one over that band.

Paper, d=512, s=2, L=8 (U=1022, 349,524 matrix entries), n=5,000, bf16: 3.5 GFLOP and 20.4 MB of units, 4.4 us of
multiplication and 4.3 us of memory on an H200 (790 TFLOP/s, 4.8 TB/s); packing moves 2.4 MB. Backward: the same again
for the units, and the same number of FLOP for the matrices, whose partial sums (1.4 MB each) take 2-8 slices of n.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import (
    INTERPRETING,
    cdiv,
    exact_float32,
    matrices_of,
    next_power_of_2,
    on_device_of,
    padded_rows,
)
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.plan import TMA_CONFIGS, exact_dot, target_of, tma_ready
from esl_fast.kernels.select import locate

DESCRIPTORS_FROM = 512  # rows; making one takes the host longer than it saves a small batch


# Degrees: O(L) work in a single program.


@triton.jit
def _degree_terms(
    w_ptr, temp_scale_1_ptr, temp_scale_2_ptr,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, SIGMOID_GATE: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """``w, |w|, min|w|, max|w|``, gate, sharpness, distance from the threshold and its exponential."""
    level = tl.arange(0, BLOCK)
    live = level < LEVELS
    w = tl.load(w_ptr + level, mask=live, other=0.0).to(tl.float32)
    size = tl.abs(w)
    low = tl.min(tl.where(live, size, float("inf")), 0)
    high = tl.max(size, 0)
    gate = tl.load(temp_scale_1_ptr).to(tl.float32)
    if SIGMOID_GATE:
        gate = 1 / (1 + tl.exp(-gate))
    if SHARP:
        sharpness = tl.exp(tl.load(temp_scale_2_ptr).to(tl.float32))
    else:
        sharpness = 0.0
    distance = tl.where(live, size - ((high - low) * gate + low), 0.0)
    return w, size, low, high, gate, sharpness, distance, tl.exp(distance * sharpness)


@triton.jit
def _degrees_forward(
    w_ptr, temp_scale_1_ptr, temp_scale_2_ptr, scales_ptr,
    FACTOR: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, SIGMOID_GATE: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    w, _, _, _, _, _, _, raised = _degree_terms(
        w_ptr, temp_scale_1_ptr, temp_scale_2_ptr, LEVELS, BLOCK, SIGMOID_GATE, SHARP
    )
    level = tl.arange(0, BLOCK)
    tl.store(scales_ptr + level, raised * w * FACTOR, mask=level < LEVELS)


@triton.jit
def _degrees_backward(
    grad_ptr, w_ptr, temp_scale_1_ptr, temp_scale_2_ptr, grad_w_ptr, grad_1_ptr, grad_2_ptr,
    FACTOR: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, SIGMOID_GATE: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    w, size, low, high, gate, sharpness, distance, raised = _degree_terms(
        w_ptr, temp_scale_1_ptr, temp_scale_2_ptr, LEVELS, BLOCK, SIGMOID_GATE, SHARP
    )
    level = tl.arange(0, BLOCK)
    live = level < LEVELS
    grad = tl.load(grad_ptr + level, mask=live, other=0.0).to(tl.float32) * FACTOR
    grad_distance = grad * raised * w * sharpness
    grad_threshold = -tl.sum(grad_distance, 0)
    # Ties share the gradient of max and min evenly, as in torch.amax and torch.amin.
    highest = (live & (size == high)).to(tl.float32)
    lowest = (live & (size == low)).to(tl.float32)
    grad_size = grad_distance + grad_threshold * (
        gate * highest / tl.sum(highest, 0) + (1 - gate) * lowest / tl.sum(lowest, 0)
    )
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    tl.store(grad_w_ptr + level, grad * raised + sign * grad_size, mask=live)
    grad_gate = grad_threshold * (high - low)
    if SIGMOID_GATE:
        grad_gate = grad_gate * gate * (1 - gate)
    tl.store(grad_1_ptr, grad_gate)
    tl.store(grad_2_ptr, tl.sum(grad * raised * w * distance, 0) * sharpness)


@cache
def _degrees_constants(levels: int, sigmoid_gate: bool, sharp: bool, mean: bool) -> dict:
    return {
        "FACTOR": 1.0 / levels if mean else 1.0,
        "LEVELS": levels,
        "BLOCK": next_power_of_2(levels),
        "SIGMOID_GATE": sigmoid_gate,
        "SHARP": sharp,
        "num_warps": 1,
    }


@op("degrees_scales")
def _degrees_scales(
    w: Tensor, temp_scale_1: Tensor, temp_scale_2: Tensor, sigmoid_gate: bool, sharp: bool, mean: bool
) -> Tensor:
    scales = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    with on_device_of(w):
        launch(
            _degrees_forward, (1, 1, 1), (w.contiguous(), temp_scale_1, temp_scale_2, scales),
            _degrees_constants(w.numel(), sigmoid_gate, sharp, mean),
        )  # fmt: skip
    return scales


@_degrees_scales.register_fake
def _(
    w: Tensor, temp_scale_1: Tensor, temp_scale_2: Tensor, sigmoid_gate: bool, sharp: bool, mean: bool
) -> Tensor:
    return torch.empty(w.shape, dtype=torch.float32, device=w.device)


@op("degrees_scales_backward")
def _degrees_scales_backward(
    grad: Tensor,
    w: Tensor,
    temp_scale_1: Tensor,
    temp_scale_2: Tensor,
    sigmoid_gate: bool,
    sharp: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (w, temp_scale_1, temp_scale_2)]
    with on_device_of(w):
        launch(
            _degrees_backward, (1, 1, 1), (grad.contiguous(), w.contiguous(), temp_scale_1, temp_scale_2, *grads),
            _degrees_constants(w.numel(), sigmoid_gate, sharp, mean),
        )  # fmt: skip
    return tuple(grads)


@_degrees_scales_backward.register_fake
def _(
    grad: Tensor,
    w: Tensor,
    temp_scale_1: Tensor,
    temp_scale_2: Tensor,
    sigmoid_gate: bool,
    sharp: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (w, temp_scale_1, temp_scale_2))


def _degrees_setup(ctx, inputs, output) -> None:
    *tensors, ctx.sigmoid_gate, ctx.sharp, ctx.mean = inputs
    ctx.save_for_backward(*tensors)


def _degrees_autograd(ctx, grad: Tensor):
    grads = _degrees_scales_backward(grad, *ctx.saved_tensors, ctx.sigmoid_gate, ctx.sharp, ctx.mean)
    return *grads, None, None, None


_degrees_scales.register_autograd(_degrees_autograd, setup_context=_degrees_setup)


def degrees_scales(
    w: Tensor,
    temp_scale_1: Tensor,
    temp_scale_2: Tensor,
    *,
    sigmoid_gate: bool,
    sharp: bool,
    mean: bool,
) -> Tensor:
    """Scales ``(L+1,)`` float32, ``degree_k`` and, if ``mean``, divided by the number of levels; differentiable.

    ``w (L+1,)``; ``temp_scale_1`` and ``temp_scale_2`` of one element each, raw: the gate is the sigmoid of the first
    if ``sigmoid_gate``, else itself; the sharpness is exp of the second if ``sharp``, else 0 (``degree_k = w_k``).
    """
    return _degrees_scales(w, temp_scale_1, temp_scale_2, sigmoid_gate, sharp, mean)


# Fold.


@triton.jit
def _band(tile, DIMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """First (a multiple of ``BLOCK_K``) and end of the units whose levels have a part in a tile of columns."""
    first = tile * BLOCK_C
    last = tl.minimum(first + BLOCK_C, WIDTH) - 1
    begin = tile * 0
    end = tile * 0 + WIDTH
    offset = 0
    for level in tl.static_range(len(DIMS)):
        begin = tl.where(first >= offset, offset, begin)
        end = tl.where((last >= offset) & (last < offset + DIMS[level]), offset + DIMS[level], end)
        offset += DIMS[level]
    return begin // BLOCK_K * BLOCK_K, end


@triton.jit
def _load_scales(scales_ptr, index, DIMS: tl.constexpr):
    """The scale of each unit's level."""
    scale = tl.load(scales_ptr).to(tl.float32) + index * 0.0
    offset = DIMS[0]
    for level in tl.static_range(1, len(DIMS)):
        scale = tl.where(index >= offset, tl.load(scales_ptr + level).to(tl.float32), scale)
        offset += DIMS[level]
    return scale


@triton.jit
def _pack(
    matrices_ptr, packed_ptr,
    DIMS: tl.constexpr, WIDTH: tl.constexpr, BANDWIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What one output column takes from each input column of its tile's band."""
    column = tl.program_id(0).to(tl.int64)
    dim, _, first, start = locate(column, DIMS, DIMS)
    begin, _ = _band(column // BLOCK_C, DIMS, WIDTH, BLOCK_C, BLOCK_K)
    entry = tl.arange(0, BLOCK)
    source = begin + entry - first
    if TRANSPOSED:
        pointers = matrices_ptr + start + source * dim + (column - first)
    else:
        pointers = matrices_ptr + start + (column - first) * dim + source
    end = tl.where(column < WIDTH, dim, 0)
    values = tl.load(pointers, mask=(source >= 0) & (source < end), other=0.0)
    tl.store(packed_ptr + column * BANDWIDTH + entry, values.to(packed_ptr.dtype.element_ty), mask=entry < BANDWIDTH)


@triton.jit
def _load_tile(
    x, x_row, x_col, n, row, column, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of ``x (n, WIDTH)``, zeros beyond its edges; ``x`` is a descriptor or a pointer."""
    if DESCRIPTORS:
        tile = x.load([row, column])
    else:
        rows = row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        columns = column + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        live = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(x + rows[:, None] * x_row + columns[None, :] * x_col, mask=live, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["n"])
def _fold_forward(
    units, units_row, units_col, packed, scales_ptr, folded_ptr, folded_row, n,
    DIMS: tl.constexpr, WIDTH: tl.constexpr, BANDWIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of folded units; the tiles of the widest levels come first. Padding columns become 0."""
    row_tiles = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * BLOCK_N
    begin, end = _band(tile, DIMS, WIDTH, BLOCK_C, BLOCK_K)
    accumulator = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in range(begin, end, BLOCK_K):
        x = _load_tile(units, units_row, units_col, n, row, k, WIDTH, BLOCK_N, BLOCK_K, DESCRIPTORS, UPCAST)
        weights = _load_tile(
            packed, BANDWIDTH, 1, 2**30, tile * BLOCK_C, k - begin, BANDWIDTH, BLOCK_C, BLOCK_K, DESCRIPTORS, UPCAST
        )
        accumulator = tl.dot(x, weights.T, accumulator, input_precision=PRECISION)
    rows = row.to(tl.int64) + tl.arange(0, BLOCK_N)
    columns = tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    folded = accumulator * _load_scales(scales_ptr, columns, DIMS)[None, :]
    live = (rows < n)[:, None] & (columns < (WIDTH + 63) // 64 * 64)[None, :]
    pointers = folded_ptr + rows[:, None] * folded_row + columns[None, :]
    tl.store(pointers, folded.to(folded_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n", "span"])
def _matrices_backward(
    left, left_row, left_col, right, right_row, right_col, partial_ptr, n, span,
    DIMS: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``left^T right`` over one slice of the rows, where both belong to the same level, into packed matrices."""
    tile = tl.program_id(0)
    part = tl.program_id(2)
    begin, end = _band(tile, DIMS, WIDTH, BLOCK_C, BLOCK_K)
    column = begin + tl.program_id(1) * BLOCK_K
    if column >= end:
        return
    accumulator = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for row in range(part * span, tl.minimum(n, (part + 1) * span), BLOCK_N):
        a = _load_tile(
            left, left_row, left_col, n, row, tile * BLOCK_C, WIDTH, BLOCK_N, BLOCK_C, DESCRIPTORS, UPCAST
        )
        b = _load_tile(right, right_row, right_col, n, row, column, WIDTH, BLOCK_N, BLOCK_K, DESCRIPTORS, UPCAST)
        accumulator = tl.dot(a.T, b, accumulator, input_precision=PRECISION)
    rows = tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_K)
    dim, _, first, start = locate(rows, DIMS, DIMS)
    inner = columns[None, :] - first[:, None]
    live = (inner >= 0) & (inner < dim[:, None]) & (rows < WIDTH)[:, None]
    pointers = partial_ptr + part.to(tl.int64) * TOTAL + (start + (rows - first) * dim)[:, None] + inner
    tl.store(pointers, accumulator, mask=live)


@triton.jit(do_not_specialize=["parts"])
def _matrices_finish(
    partial_ptr, matrices_ptr, scales_ptr, grad_matrices_ptr, products_ptr, parts,
    DIMS: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a matrix: the sum over slices, the gradient, and the row's part of the gradient to the scale."""
    row = tl.program_id(0).to(tl.int64)
    dim, _, first, start = locate(row, DIMS, DIMS)
    entry = tl.arange(0, BLOCK)
    live = entry < dim
    offsets = start + (row - first) * dim + entry
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + tl.cast(part, tl.int64) * TOTAL + offsets, mask=live, other=0.0)
    matrix = tl.load(matrices_ptr + offsets, mask=live, other=0.0).to(tl.float32)
    tl.store(products_ptr + row, tl.sum(total * matrix, 0))
    grad = total * _load_scales(scales_ptr, row, DIMS)
    tl.store(grad_matrices_ptr + offsets, grad.to(grad_matrices_ptr.dtype.element_ty), mask=live)


@triton.jit
def _scales_finish(products_ptr, grad_scales_ptr, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of one level's rows."""
    offset = tl.program_id(0) * 0
    dim = offset + DIMS[0]
    next_offset = DIMS[0]
    for level in tl.static_range(1, len(DIMS)):
        reached = tl.program_id(0) >= level
        offset = tl.where(reached, next_offset, offset)
        dim = tl.where(reached, DIMS[level], dim)
        next_offset += DIMS[level]
    entry = tl.arange(0, BLOCK)
    products = tl.load(products_ptr + offset + entry, mask=entry < dim, other=0.0)
    tl.store(grad_scales_ptr + tl.program_id(0), tl.sum(products, 0).to(grad_scales_ptr.dtype.element_ty))


WARPS = 8


def _tiles(dtype: torch.dtype) -> tuple[dict, dict]:
    """Tiles of the fold and of the matrices' gradient."""
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_K": 16}, {"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_K": 64}
    return {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_K": 64}, {"BLOCK_N": 64, "BLOCK_C": 128, "BLOCK_K": 64}


def _stages(hip: bool) -> int:
    return 2 if hip else 3


def _fold_warps(dtype: torch.dtype, descriptors: bool) -> int:
    """With descriptors in 16 bits half as many: no addresses lie in registers."""
    return WARPS // 2 if descriptors and dtype != torch.float32 else WARPS


@cache
def _bandwidth(dims: tuple[int, ...], block_c: int, block_k: int) -> tuple[int, int]:
    """Number of column tiles, and columns (a multiple of ``block_k``) of their widest band; as in :func:`_band`."""
    width = sum(dims)
    level_of = [level for level, dim in enumerate(dims) for _ in range(dim)]
    bands = []
    for first in range(0, width, block_c):
        begin = sum(dims[: level_of[first]]) // block_k * block_k
        end = sum(dims[: level_of[min(first + block_c, width) - 1] + 1])
        bands.append(cdiv(end - begin, block_k) * block_k)
    return len(bands), max(bands)


def _precision(device: torch.device) -> str:
    return exact_dot(target_of(device)) if exact_float32() else "tf32"


def _has_descriptors(device: torch.device) -> bool:
    return target_of(device) in TMA_CONFIGS


def _descriptors(n: int, *operands: Tensor) -> bool:
    """Whether ``n`` rows pay for descriptors, the device has them and the operands fit them."""
    return n >= DESCRIPTORS_FROM and _has_descriptors(operands[0].device) and all(map(tma_ready, operands))


def _matrix_dims(matrices: Sequence[Tensor], units: Tensor) -> tuple[int, ...]:
    shapes = [tuple(m.shape) for m in matrices]
    dims = tuple(shape[0] for shape in shapes)
    if shapes != [(dim, dim) for dim in dims] or sum(dims) != units.shape[1]:
        raise ValueError(f"matrices must be (d_k, d_k) with sum d_k = {units.shape[1]}, got {shapes}")
    return dims


@torch.no_grad()
def _flat(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def _launch_pack(flat: Tensor, dims: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> Tensor:
    """``D_k^T`` of all levels, or ``D_k`` if ``transposed``, as the fold reads them."""
    tiles, _ = _tiles(dtype)
    count, bandwidth = _bandwidth(dims, tiles["BLOCK_C"], tiles["BLOCK_K"])
    packed = torch.empty((count * tiles["BLOCK_C"], bandwidth), dtype=dtype, device=flat.device)
    with on_device_of(flat):
        launch(
            _pack, (packed.shape[0], 1, 1), (flat, packed),
            {
                "DIMS": dims, "WIDTH": sum(dims), "BANDWIDTH": bandwidth, "BLOCK": next_power_of_2(bandwidth),
                "BLOCK_C": tiles["BLOCK_C"], "BLOCK_K": tiles["BLOCK_K"], "TRANSPOSED": transposed, "num_warps": 4,
            },
        )  # fmt: skip
    return packed


def _launch_fold(x: Tensor, packed: Tensor, dims: tuple[int, ...], scales: Tensor) -> Tensor:
    """``x`` with each level multiplied by its scale and by what is ``packed`` for it."""
    n, width = x.shape
    folded = padded_rows(n, width, x.dtype, x.device)
    if n == 0:
        return folded
    tiles, _ = _tiles(x.dtype)
    count, bandwidth = _bandwidth(dims, tiles["BLOCK_C"], tiles["BLOCK_K"])
    descriptors = _descriptors(n, x)
    units, weights = x, packed
    if descriptors:
        units = TensorDescriptor.from_tensor(x, [tiles["BLOCK_N"], tiles["BLOCK_K"]])
        weights = TensorDescriptor.from_tensor(packed, [tiles["BLOCK_C"], tiles["BLOCK_K"]])
    with on_device_of(x):
        launch(
            _fold_forward, (count * cdiv(n, tiles["BLOCK_N"]), 1, 1),
            (units, *x.stride(), weights, scales, folded, folded.stride(0), n),
            {
                "DIMS": dims, "WIDTH": width, "BANDWIDTH": bandwidth, **tiles, "DESCRIPTORS": descriptors,
                "UPCAST": INTERPRETING, "PRECISION": _precision(x.device),
                "num_warps": _fold_warps(x.dtype, descriptors), "num_stages": _stages(bool(torch.version.hip)),
            },
        )  # fmt: skip
    return folded


def _launch_matrices_backward(
    left: Tensor, right: Tensor, flat: Tensor, dims: tuple[int, ...], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to the packed matrices, from ``left^T right`` in each level, and to the scales."""
    n, width = left.shape
    grad_scales = torch.empty(len(dims), dtype=scales.dtype, device=left.device)
    if n == 0:
        return torch.zeros_like(flat), grad_scales.zero_()
    _, tiles = _tiles(left.dtype)
    count, bandwidth = _bandwidth(dims, tiles["BLOCK_C"], tiles["BLOCK_K"])
    parts = min(8, cdiv(n, 256))
    span = cdiv(cdiv(n, parts), tiles["BLOCK_N"]) * tiles["BLOCK_N"]
    partial = torch.empty((parts, flat.numel()), dtype=torch.float32, device=left.device)
    products = torch.empty(width, dtype=torch.float32, device=left.device)
    grad_matrices = torch.empty_like(flat)
    descriptors = _descriptors(n, left, right)
    a, b = left, right
    if descriptors:
        a = TensorDescriptor.from_tensor(left, [tiles["BLOCK_N"], tiles["BLOCK_C"]])
        b = TensorDescriptor.from_tensor(right, [tiles["BLOCK_N"], tiles["BLOCK_K"]])
    block = next_power_of_2(max(dims))
    with on_device_of(left):
        launch(
            _matrices_backward, (count, bandwidth // tiles["BLOCK_K"], parts),
            (a, *left.stride(), b, *right.stride(), partial, n, span),
            {
                "DIMS": dims, "WIDTH": width, "TOTAL": flat.numel(), **tiles,
                "DESCRIPTORS": descriptors, "UPCAST": INTERPRETING, "PRECISION": _precision(left.device),
                "num_warps": WARPS, "num_stages": _stages(bool(torch.version.hip)),
            },
        )  # fmt: skip
        launch(
            _matrices_finish, (width, 1, 1), (partial, flat, scales, grad_matrices, products, parts),
            {"DIMS": dims, "TOTAL": flat.numel(), "BLOCK": block, "num_warps": 2},
        )  # fmt: skip
        launch(
            _scales_finish, (len(dims), 1, 1), (products, grad_scales),
            {"DIMS": dims, "BLOCK": block, "num_warps": 2},
        )  # fmt: skip
    return grad_matrices, grad_scales


@op("fold")
def _fold(units: Tensor, matrices: list[Tensor], flat: Tensor, scales: Tensor, side: str) -> Tensor:
    """``flat`` holds the ``matrices`` one after another; their gradient goes to ``matrices``."""
    image = side == "image"
    dims = _matrix_dims(matrices, units)
    return _launch_fold(units, _launch_pack(flat, dims, units.dtype, image), dims, scales.contiguous())


@_fold.register_fake
def _(units: Tensor, matrices: list[Tensor], flat: Tensor, scales: Tensor, side: str) -> Tensor:
    return padded_rows(units.shape[0], units.shape[1], units.dtype, units.device)


@op("fold_backward")
def _fold_backward(
    grad: Tensor, units: Tensor, flat: Tensor, scales: Tensor, dims: list[int], side: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the units, to all matrices in one buffer and to the scales."""
    image = side == "image"
    levels = tuple(dims)
    scales = scales.contiguous()
    grad = grad.to(units.dtype)
    grad_units = _launch_fold(grad, _launch_pack(flat, levels, grad.dtype, not image), levels, scales)
    left, right = (units, grad) if image else (grad, units)
    grad_matrices, grad_scales = _launch_matrices_backward(left, right, flat, levels, scales)
    return grad_units, grad_matrices, grad_scales


@_fold_backward.register_fake
def _(
    grad: Tensor, units: Tensor, flat: Tensor, scales: Tensor, dims: list[int], side: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        padded_rows(units.shape[0], units.shape[1], units.dtype, units.device),
        torch.empty_like(flat),
        torch.empty_like(scales),
    )


def _fold_setup(ctx, inputs, output) -> None:
    units, matrices, flat, scales, ctx.side = inputs
    ctx.dims = [int(matrix.shape[0]) for matrix in matrices]
    ctx.dtypes = [matrix.dtype for matrix in matrices]
    ctx.save_for_backward(units, flat, scales)


def _fold_autograd(ctx, grad: Tensor):
    grad_units, grad_flat, grad_scales = _fold_backward(grad, *ctx.saved_tensors, ctx.dims, ctx.side)
    grad_matrices = matrices_of(grad_flat, [(dim, dim) for dim in ctx.dims], ctx.dtypes)
    return grad_units, grad_matrices, None, grad_scales, None


_fold.register_autograd(_fold_autograd, setup_context=_fold_setup)


def fold(units: Tensor, matrices: Sequence[Tensor], scales: Tensor, side: str) -> Tensor:
    """Each level of ``units (n, U)`` multiplied by ``scales[k] * D_k``, ``(n, U)``; differentiable in all.

    ``matrices`` ``(d_k, d_k)`` are rounded to the dtype of the units, the scales (L+1,) are applied in float32.
    ``side`` is that whose units these are, ``"text"`` (``D y``) or ``"image"`` (``D^T x``). Rows are padded with zeros
    to a multiple of 64. Small levels share tiles, so a NaN or infinite unit may make units of other levels NaN too.
    """
    return _fold(units, list(matrices), _flat(matrices), scales, side)


def pack(matrices: Sequence[Tensor], dtype: torch.dtype, side: str) -> Tensor:
    """Matrices as :func:`fold_packed` takes them for units of a dtype and side."""
    dims = tuple(matrix.shape[0] for matrix in matrices)
    return _launch_pack(_flat(matrices), dims, dtype, side == "image")


@op("fold_packed")
def fold_packed(units: Tensor, packed: Tensor, dims: list[int], scales: Tensor) -> Tensor:
    """:func:`fold` of ``units`` of levels of sizes ``dims`` by matrices that are packed; without a gradient."""
    return _launch_fold(units, packed, tuple(dims), scales.contiguous())


@fold_packed.register_fake
def _(units: Tensor, packed: Tensor, dims: list[int], scales: Tensor) -> Tensor:
    return padded_rows(units.shape[0], units.shape[1], units.dtype, units.device)


def compile_cases() -> list[CompileCase]:
    """The paper's size (d=512, s=2, L=8, n=5,000) with and without descriptors, and in float32."""
    dims = tuple(512 >> level for level in range(9))
    width, total, n = sum(dims), sum(dim * dim for dim in dims), 5000
    degrees = {"FACTOR": 1 / 9, "LEVELS": 9, "BLOCK": 16, "SIGMOID_GATE": True, "SHARP": True}
    parameters = dict.fromkeys(("w_ptr", "temp_scale_1_ptr", "temp_scale_2_ptr"), "*fp32")
    gradients = dict.fromkeys(("grad_ptr", "grad_w_ptr", "grad_1_ptr", "grad_2_ptr"), "*fp32")
    found = [
        CompileCase(
            "degrees_forward", _degrees_forward, {**parameters, "scales_ptr": "*fp32"}, degrees, 1, 3,
            divisible=(*parameters, "scales_ptr"), flops=90, bytes=80, precision="fp32",
        ),
        CompileCase(
            "degrees_backward", _degrees_backward, {**parameters, **gradients}, degrees, 1, 3,
            divisible=(*parameters, *gradients), flops=300, bytes=160, precision="fp32",
        ),
    ]  # fmt: skip
    hopper, others = ("sm_90", "sm_100"), ("sm_80", "gfx942")
    kinds = (
        ("bf16", True, "ieee", hopper),
        ("bf16", False, "ieee", ("sm_80", "sm_90", "sm_100")),
        ("bf16", False, "ieee", ("gfx942",)),
        ("fp32", True, "ieee", ("sm_100",)),
        ("fp32", True, "tf32x3", ("sm_90",)),
        ("fp32", False, "tf32x3", ("sm_90",)),
        ("fp32", True, "tf32", hopper),
        ("fp32", False, "ieee", others),
    )
    for kind, descriptors, precision, targets in kinds:
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        (tiles, back_tiles), stages = _tiles(dtype), _stages("gfx942" in targets)
        name = f"{kind}{'' if kind == 'bf16' else '_' + precision}_{'tma' if descriptors else 'pointers'}_{targets[0]}"
        unit = "bf16" if kind == "bf16" else {"ieee": "fp32"}.get(precision, precision)

        def operand(*block: str, kind=kind, descriptors=descriptors) -> str:
            return f"tensordesc<{kind}[{block[0]}, {block[1]}]>" if descriptors else f"*{kind}"

        common = {"DESCRIPTORS": descriptors, "UPCAST": False, "PRECISION": precision, "DIMS": dims, "WIDTH": width}
        bandwidth = _bandwidth(dims, tiles["BLOCK_C"], tiles["BLOCK_K"])[1]
        signature = {
            "units": operand(tiles["BLOCK_N"], tiles["BLOCK_K"]), "units_row": "i32",
            "packed": operand(tiles["BLOCK_C"], tiles["BLOCK_K"]), "scales_ptr": "*fp32",
            "folded_ptr": f"*{kind}", "folded_row": "i32", "n": "i32",
        }  # fmt: skip
        aligned = tuple(k for k, v in signature.items() if k != "n" and not v.startswith("tensordesc"))
        size = dtype.itemsize
        found.append(
            CompileCase(
                f"fold_{name}", _fold_forward, signature, {**common, **tiles, "BANDWIDTH": bandwidth, "units_col": 1},
                _fold_warps(dtype, descriptors), stages, aligned,
                wants_wgmma=precision != "ieee" or kind == "bf16", flops=2 * n * total,
                bytes=size * (2 * n * width + total), precision=unit, targets=targets,
            )
        )  # fmt: skip
        signature = {
            "left": operand(back_tiles["BLOCK_N"], back_tiles["BLOCK_C"]), "left_row": "i32",
            "right": operand(back_tiles["BLOCK_N"], back_tiles["BLOCK_K"]), "right_row": "i32",
            "partial_ptr": "*fp32", "n": "i32", "span": "i32",
        }  # fmt: skip
        aligned = tuple(k for k, v in signature.items() if k not in ("n", "span") and not v.startswith("tensordesc"))
        found.append(
            CompileCase(
                f"matrices_backward_{name}", _matrices_backward, signature,
                {**common, **back_tiles, "TOTAL": total, "left_col": 1, "right_col": 1},
                WARPS, stages, aligned, wants_wgmma=precision != "ieee" or kind == "bf16", flops=2 * n * total,
                bytes=size * 2 * n * width + 32 * total, precision=unit, targets=targets,
            )
        )  # fmt: skip
    pack = {"DIMS": dims, "WIDTH": width, "BANDWIDTH": 512, "BLOCK": 512, "BLOCK_C": 128, "BLOCK_K": 64}
    for transposed in (False, True):
        found.append(
            CompileCase(
                f"pack{'_transposed' * transposed}", _pack, {"matrices_ptr": "*fp32", "packed_ptr": "*bf16"},
                {**pack, "TRANSPOSED": transposed}, 4, 3, ("matrices_ptr", "packed_ptr"),
                bytes=4 * total + 2 * 1024 * 512, precision="fp32",
            )
        )  # fmt: skip
    pointers = dict.fromkeys(
        ("partial_ptr", "matrices_ptr", "scales_ptr", "grad_matrices_ptr", "products_ptr"), "*fp32"
    )
    found += [
        CompileCase(
            "matrices_finish", _matrices_finish, {**pointers, "parts": "i32"},
            {"DIMS": dims, "TOTAL": total, "BLOCK": 512}, 2, 3, tuple(pointers),
            flops=10 * total, bytes=40 * total, precision="fp32",
        ),
        CompileCase(
            "scales_finish", _scales_finish, {"products_ptr": "*fp32", "grad_scales_ptr": "*fp32"},
            {"DIMS": dims, "BLOCK": 512}, 2, 3, ("products_ptr", "grad_scales_ptr"),
            bytes=4 * width, precision="fp32",
        ),
    ]  # fmt: skip
    return found
