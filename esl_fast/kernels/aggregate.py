"""Measure-units of embeddings: every level, its norm and the concatenation in one pass over the embeddings.

A program holds a few whole embeddings in registers and forms all levels from them in float32, so that an embedding is
read once and its units are written once; only the units are rounded to the dtype of the embeddings. The backwards
read the embeddings again instead of saving anything.

Paper, n embeddings of d=512, s=2, L=8 (U=1022), bf16: forward reads 1 KB and writes 2 KB an embedding, backward reads
3 KB and writes 1 KB; some 4 and 12 FLOP a unit. 5,000 captions: 15 MB, 3.2 us forward and 20 MB, 4.3 us backward on an
H200 (4.8 TB/s), 0.02 and 0.06 GFLOP, so the bytes decide.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import cdiv, matrices_of, next_power_of_2, on_device_of, padded_rows
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.plan import processors
from esl_fast.kernels.select import EPS, Selection, adaptive_dims, locate
from esl_fast.reference.aggregate import CHAINS, level_dims

PROGRAMS = 16  # of the adaptive forward on a multiprocessor, one warp each


@triton.jit
def _load_embeddings(x_ptr, x_row, x_col, rows, columns, n, DIM: tl.constexpr, NORMALIZE: tl.constexpr):
    """Embeddings in float32 and, if ``NORMALIZE``, their norms, by which they are divided."""
    live = (rows < n)[:, None] & (columns < DIM)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row + columns[None, :] * x_col, mask=live, other=0.0).to(tl.float32)
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(x * x, 1))
        norm = tl.where(rows < n, norm, 1.0)
        x = x * (1.0 / norm)[:, None]
    else:
        norm = tl.full((x.shape[0],), 1.0, tl.float32)
    return x, norm


@triton.jit
def _l2norm(z):
    """``z / (||z|| + eps)`` and ``||z||``."""
    norm = tl.sqrt_rn(tl.sum(z * z, 1))
    return z * (1.0 / (norm + EPS))[:, None], norm


@triton.jit
def _l2norm_backward(grad, unit, norm):
    """Gradient to ``z`` from that to ``unit = z / (norm + eps)``; 0 to a zero ``z``."""
    scale = tl.where(norm == 0, 0.0, 1.0 / (norm + EPS))
    ratio = 1.0 + EPS / tl.where(norm == 0, 1.0, norm)
    return (grad - unit * (tl.sum(grad * unit, 1) * ratio)[:, None]) * scale[:, None]


@triton.jit
def _store_units(units_ptr, units_row, rows, columns, n, units, OFFSET: tl.constexpr, DIM: tl.constexpr):
    live = (rows < n)[:, None] & (columns < DIM)[None, :]
    pointers = units_ptr + rows[:, None] * units_row + (OFFSET + columns)[None, :]
    tl.store(pointers, units.to(units_ptr.dtype.element_ty), mask=live)


@triton.jit
def _load_gradient(grad_ptr, grad_row, grad_col, rows, columns, n, OFFSET: tl.constexpr, DIM: tl.constexpr):
    live = (rows < n)[:, None] & (columns < DIM)[None, :]
    pointers = grad_ptr + rows[:, None] * grad_row + (OFFSET + columns)[None, :] * grad_col
    return tl.load(pointers, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store_embedding_gradient(grad_x_ptr, rows, columns, n, grad, x, norm, DIM: tl.constexpr, NORMALIZE: tl.constexpr):
    """Through the division by the norm, to a contiguous ``(n, DIM)``."""
    if NORMALIZE:
        grad = (grad - x * tl.sum(grad * x, 1)[:, None]) / norm[:, None]
    live = (rows < n)[:, None] & (columns < DIM)[None, :]
    tl.store(grad_x_ptr + rows[:, None] * DIM + columns[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=live)


@triton.jit
def _zero_padding(units_ptr, units_row, rows, n, WIDTH: tl.constexpr):
    columns = WIDTH + tl.arange(0, 64).to(tl.int64)
    live = (rows < n)[:, None] & (columns < units_row)[None, :]
    zeros = tl.zeros((rows.shape[0], 64), units_ptr.dtype.element_ty)
    tl.store(units_ptr + rows[:, None] * units_row + columns[None, :], zeros, mask=live)


# Heuristic: windows of s elements, formed in registers by reshaping (rows, positions) to (rows, windows, radix).
#
# The radix is s rounded up to a power of two, as shapes must be powers of two. A position's `levels` lowest digits in
# that radix say which element of each coarser level's window it is; positions with a digit >= s hold zeros. For s = 2
# or 4 position and element are the same.


@triton.jit
def _elements(positions: tl.constexpr, levels: tl.constexpr, SIZE: tl.constexpr, RADIX: tl.constexpr):
    """The element (int64) at each of a level's positions; one out of range at positions that hold none."""
    position = tl.arange(0, positions)
    if SIZE != RADIX:
        element = tl.zeros((positions,), tl.int32)
        weight = 1
        hole = position < 0
        for _ in tl.static_range(levels):
            digit = position % RADIX
            hole |= digit >= SIZE
            element += digit * weight
            position = position // RADIX
            weight = weight * SIZE
        position = tl.where(hole, 2**30, element + position * weight)
    return position.to(tl.int64)


@triton.jit
def _load_taps(taps_ptr, level: tl.constexpr, SIZE: tl.constexpr, RADIX: tl.constexpr):
    tap = tl.arange(0, RADIX)
    return tl.load(taps_ptr + level * SIZE + tap, mask=tap < SIZE, other=0.0).to(tl.float32)[None, None, :]


@triton.jit
def _filter(z, taps, elements, DIM: tl.constexpr, RADIX: tl.constexpr):
    """The next level before its norm; an incomplete window, which lies beyond ``DIM``, becomes 0."""
    z = tl.sum(tl.reshape(z, (z.shape[0], z.shape[1] // RADIX, RADIX)) * taps, 2)
    return tl.where((elements < DIM)[None, :], z, 0.0)


@triton.jit(do_not_specialize=["n"])
def _heuristic_forward(
    x_ptr, x_row, x_col, taps_ptr, units_ptr, units_row, n,
    DIMS: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr, RADIX: tl.constexpr, POSITIONS: tl.constexpr,
    ROWS: tl.constexpr, RAW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    LEVELS: tl.constexpr = len(DIMS) - 1
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    elements = _elements(POSITIONS, LEVELS, SIZE, RADIX)
    z, _ = _load_embeddings(x_ptr, x_row, x_col, rows, elements, n, DIMS[0], NORMALIZE)
    _store_units(units_ptr, units_row, rows, elements, n, z, 0, DIMS[0])
    for level in tl.static_range(1, LEVELS + 1):
        elements = _elements(z.shape[1] // RADIX, LEVELS - level, SIZE, RADIX)
        z = _filter(z, _load_taps(taps_ptr, level - 1, SIZE, RADIX), elements, DIMS[level], RADIX)
        units, _ = _l2norm(z)
        _store_units(units_ptr, units_row, rows, elements, n, units, OFFSETS[level], DIMS[level])
        if not RAW:
            z = units
    _zero_padding(units_ptr, units_row, rows, n, OFFSETS[LEVELS + 1])


@triton.jit(do_not_specialize=["n"])
def _heuristic_backward(
    grad_ptr, grad_row, grad_col, x_ptr, x_row, x_col, taps_ptr, grad_x_ptr, partial_ptr, n,
    DIMS: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr, RADIX: tl.constexpr, POSITIONS: tl.constexpr,
    ROWS: tl.constexpr, RAW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients to the embeddings and, for this program's rows alone, to the taps."""
    LEVELS: tl.constexpr = len(DIMS) - 1
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    elements = _elements(POSITIONS, LEVELS, SIZE, RADIX)
    x, x_norm = _load_embeddings(x_ptr, x_row, x_col, rows, elements, n, DIMS[0], NORMALIZE)
    chain = (x,)  # what each level reads
    units = (x,)
    norms = (x_norm,)
    for level in tl.static_range(1, LEVELS + 1):
        inner = _elements(chain[level - 1].shape[1] // RADIX, LEVELS - level, SIZE, RADIX)
        z = _filter(chain[level - 1], _load_taps(taps_ptr, level - 1, SIZE, RADIX), inner, DIMS[level], RADIX)
        unit, norm = _l2norm(z)
        chain = chain + ((z if RAW else unit),)
        units = units + (unit,)
        norms = norms + (norm,)

    tap = tl.arange(0, RADIX)
    carried = tl.zeros_like(chain[LEVELS])  # gradient to what the next coarser level reads
    for level in tl.static_range(LEVELS, 0, -1):
        inner = _elements(chain[level].shape[1], LEVELS - level, SIZE, RADIX)
        grad = _load_gradient(grad_ptr, grad_row, grad_col, rows, inner, n, OFFSETS[level], DIMS[level])
        if RAW:
            grad = _l2norm_backward(grad, units[level], norms[level]) + carried
        else:
            grad = _l2norm_backward(grad + carried, units[level], norms[level])
        windows = tl.reshape(chain[level - 1], (ROWS, grad.shape[1], RADIX))
        grad_taps = tl.sum(tl.sum(windows * grad[:, :, None], 1), 0)
        tl.store(partial_ptr + (program * LEVELS + level - 1) * SIZE + tap, grad_taps, mask=tap < SIZE)
        taps = _load_taps(taps_ptr, level - 1, SIZE, RADIX)
        carried = tl.reshape(grad[:, :, None] * taps, (ROWS, grad.shape[1] * RADIX))
    grad = _load_gradient(grad_ptr, grad_row, grad_col, rows, elements, n, 0, DIMS[0]) + carried
    _store_embedding_gradient(grad_x_ptr, rows, elements, n, grad, x, x_norm, DIMS[0], NORMALIZE)


@cache
def _heuristic_config(embed_dim: int, size: int, levels: int) -> tuple[dict, int]:
    """Constants of the heuristic kernels and their number of warps."""
    dims = level_dims(embed_dim, size, levels)
    radix = next_power_of_2(size)
    positions = next_power_of_2(cdiv(embed_dim, size**levels)) * radix**levels
    # A warp an embedding, 16 elements a thread: all levels stay in registers and no norm waits for another warp.
    rows = max(1, 512 // positions)
    warps = min(16, max(1, positions // 512))
    constants = {
        "DIMS": tuple(dims),
        "OFFSETS": (0, *accumulate(dims)),
        "SIZE": size,
        "RADIX": radix,
        "POSITIONS": positions,
        "ROWS": rows,
    }
    return constants, warps


@op("aggregate_heuristic")
def _aggregate_heuristic(x: Tensor, taps: Tensor, chain: str, normalize: bool) -> Tensor:
    raw = chain == "raw"
    constants, warps = _heuristic_config(x.shape[1], taps.shape[1], taps.shape[0])
    width = constants["OFFSETS"][-1]
    units = padded_rows(x.shape[0], width, x.dtype, x.device)
    if x.shape[0]:
        grid = (cdiv(x.shape[0], constants["ROWS"]), 1, 1)
        with on_device_of(x):
            launch(
                _heuristic_forward, grid,
                (x, *x.stride(), taps.contiguous(), units, units.stride(0), x.shape[0]),
                {**constants, "RAW": raw, "NORMALIZE": normalize, "num_warps": warps},
            )  # fmt: skip
    return units


@_aggregate_heuristic.register_fake
def _(x: Tensor, taps: Tensor, chain: str, normalize: bool) -> Tensor:
    constants, _ = _heuristic_config(int(x.shape[1]), int(taps.shape[1]), int(taps.shape[0]))
    return padded_rows(x.shape[0], constants["OFFSETS"][-1], x.dtype, x.device)


@op("aggregate_heuristic_backward")
def _aggregate_heuristic_backward(
    grad: Tensor, x: Tensor, taps: Tensor, chain: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    raw = chain == "raw"
    constants, warps = _heuristic_config(x.shape[1], taps.shape[1], taps.shape[0])
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = cdiv(x.shape[0], constants["ROWS"])
    partial = torch.empty((programs, *taps.shape), dtype=torch.float32, device=x.device)
    if programs:
        with on_device_of(x):
            launch(
                _heuristic_backward, (programs, 1, 1),
                (grad, *grad.stride(), x, *x.stride(), taps.contiguous(), grad_x, partial, x.shape[0]),
                {**constants, "RAW": raw, "NORMALIZE": normalize, "num_warps": warps},
            )  # fmt: skip
    return grad_x, partial.sum(0).to(taps.dtype)


@_aggregate_heuristic_backward.register_fake
def _(grad: Tensor, x: Tensor, taps: Tensor, chain: str, normalize: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(
        taps.shape, dtype=taps.dtype, device=taps.device
    )


def _heuristic_setup(ctx, inputs, output) -> None:
    x, taps, ctx.chain, ctx.normalize = inputs
    ctx.save_for_backward(x, taps)


def _heuristic_autograd(ctx, grad: Tensor):
    grad_x, grad_taps = _aggregate_heuristic_backward(grad, *ctx.saved_tensors, ctx.chain, ctx.normalize)
    return grad_x, grad_taps, None, None


_aggregate_heuristic.register_autograd(_heuristic_autograd, setup_context=_heuristic_setup)


def aggregate_heuristic(x: Tensor, taps: Tensor, chain: str, normalize: bool = True) -> Tensor:
    """Units ``(n, U)`` of embeddings ``x (n, d)`` by filters ``taps (L, s)`` of stride s; differentiable in both.

    ``x`` float32, bfloat16 or float16 of any strides; the units are of its dtype, in rows padded with zeros to a
    multiple of 64. ``chain`` is what the next level reads, ``"normalized"`` units or ``"raw"`` vectors.
    ``normalize`` divides each embedding by its norm first (an embedding of zeros gives NaN).
    """
    return _aggregate_heuristic(x, taps, chain, normalize)


# Adaptive: each unit of a level is a combination of the few units of the level before that its row selected.
#
# Any unit may be selected, so levels pass through memory: the first is read where the embeddings lie, a later one where
# the program itself wrote it, after a barrier, which orders the block's accesses to global memory too. `tl.gather`
# would need no memory but compiles to a shuffle for every register of its source, or to local memory.


@triton.jit
def _load_slot(indices_ptr, values_ptr, slot, unit, DIM: tl.constexpr):
    index = tl.load(indices_ptr + slot * DIM + unit, mask=unit < DIM, other=0).to(tl.int64)
    value = tl.load(values_ptr + slot * DIM + unit, mask=unit < DIM, other=0.0)
    return index, value


@triton.jit
def _combine(
    source, stride, indices_ptr, values_ptr, counts_ptr,
    DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """``out[:, i] = sum over slots of values[slot, i] * source[:, indices[slot, i]]``.

    ``source`` points to unit 0 of each sample ``(samples, 1)``, units lie ``stride`` apart; ``WRITTEN``: this program
    has just written them, so a barrier comes first. The longest list bounds the loop, of at most ``SLOTS``. Slots
    beyond a shorter list hold zeros.
    """
    # What the barrier need not hold back: two slots are all that most lists have.
    unit = tl.arange(0, PADDED)
    slots = tl.max(tl.load(counts_ptr + unit, mask=unit < DIM, other=0), 0)
    index, value = _load_slot(indices_ptr, values_ptr, 0, unit, DIM)
    second_index, second_value = _load_slot(indices_ptr, values_ptr, min(1, SLOTS - 1), unit, DIM)
    if WRITTEN:
        tl.debug_barrier()
    out = value[None, :] * tl.load(source + index[None, :] * stride).to(tl.float32)
    if SLOTS > 1:
        out += second_value[None, :] * tl.load(source + second_index[None, :] * stride).to(tl.float32)
    for slot in range(2, slots):
        index, value = _load_slot(indices_ptr, values_ptr, slot, unit, DIM)
        out += value[None, :] * tl.load(source + index[None, :] * stride).to(tl.float32)
    return out


# Lists of two selections may lie in one buffer, the second one's counts wherever the first one's end.
COUNTS = ["counts_ptr", "back_counts_ptr"]


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=COUNTS)
def _adaptive_forward(
    x_ptr, x_row, x_col, columns_ptr, values_ptr, counts_ptr, chain_ptr, units_ptr, units_row, n,
    DIMS: tl.constexpr, PADDED: tl.constexpr, OFFSETS: tl.constexpr, STARTS: tl.constexpr, CHAIN: tl.constexpr,
    ROWS: tl.constexpr, RAW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """``chain_ptr`` has ``CHAIN`` elements a row of each program, which it uses again for its next rows."""
    LEVELS: tl.constexpr = len(DIMS) - 1
    own = tl.arange(0, ROWS).to(tl.int64)
    chain = chain_ptr + ((own * 0 + tl.program_id(0)) * ROWS + own)[:, None] * CHAIN
    for block in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        rows = (own * 0 + block) * ROWS + own
        columns = tl.arange(0, PADDED[0]).to(tl.int64)
        z, norm = _load_embeddings(x_ptr, x_row, x_col, rows, columns, n, DIMS[0], NORMALIZE)
        _store_units(units_ptr, units_row, rows, columns, n, z, 0, DIMS[0])
        source = x_ptr + tl.minimum(rows, n - 1)[:, None] * x_row
        stride = x_col
        for k in tl.static_range(1, LEVELS + 1):
            if k > 1:
                source = chain + (OFFSETS[k - 1] - DIMS[0])
                stride = 1
                tl.store(source + columns[None, :], z, mask=(columns < DIMS[k - 1])[None, :])
            z = _combine(
                source, stride, columns_ptr + STARTS[k - 1], values_ptr + STARTS[k - 1],
                counts_ptr + (OFFSETS[k] - DIMS[0]), DIMS[k], PADDED[k], DIMS[k - 1], k > 1,
            )  # fmt: skip
            if k == 1 and NORMALIZE:
                z = z * (1.0 / norm)[:, None]
            units, _ = _l2norm(z)
            columns = tl.arange(0, PADDED[k]).to(tl.int64)
            _store_units(units_ptr, units_row, rows, columns, n, units, OFFSETS[k], DIMS[k])
            if not RAW:
                z = units
        _zero_padding(units_ptr, units_row, rows, n, OFFSETS[LEVELS + 1])
        tl.debug_barrier()  # before the next rows' levels overwrite these


@triton.jit
def _store_transposed(chain_ptr, chain_row, samples, values, FIRST: tl.constexpr, DIM: tl.constexpr):
    """Write ``values (samples, units)`` where a unit's values for all samples lie side by side."""
    unit = tl.arange(0, values.shape[1]).to(tl.int64)
    pointers = chain_ptr + (FIRST + unit)[None, :] * chain_row + samples[:, None]
    tl.store(pointers, values, mask=(unit < DIM)[None, :])


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=COUNTS)
def _adaptive_backward(
    grad_ptr, grad_row, grad_col, x_ptr, x_row, x_col, columns_ptr, values_ptr, counts_ptr,
    back_rows_ptr, back_values_ptr, back_counts_ptr, grad_x_ptr, grad_z_ptr, chain_ptr, chain_row, n,
    DIMS: tl.constexpr, PADDED: tl.constexpr, OFFSETS: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, RAW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient to the embeddings; and what that to the weights is made of, a unit a row: what each level has read and
    the gradient to each level before its norm."""
    LEVELS: tl.constexpr = len(DIMS) - 1
    chain_row = tl.cast(chain_row, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_columns = tl.arange(0, PADDED[0]).to(tl.int64)
    x, x_norm = _load_embeddings(x_ptr, x_row, x_col, rows, x_columns, n, DIMS[0], NORMALIZE)
    z = x
    units = (x,)
    norms = (x_norm,)
    for level in tl.static_range(1, LEVELS + 1):
        _store_transposed(chain_ptr, chain_row, rows, z, OFFSETS[level - 1], DIMS[level - 1])
        start = STARTS[level - 1]
        z = _combine(
            chain_ptr + OFFSETS[level - 1] * chain_row + rows[:, None], chain_row,
            columns_ptr + start, values_ptr + start, counts_ptr + (OFFSETS[level] - DIMS[0]),
            DIMS[level], PADDED[level], DIMS[level - 1], True,
        )  # fmt: skip
        unit, norm = _l2norm(z)
        units = units + (unit,)
        norms = norms + (norm,)
        if not RAW:
            z = unit

    carried = tl.zeros_like(z)  # gradient to what the next coarser level has read
    for level in tl.static_range(LEVELS, 0, -1):
        columns = tl.arange(0, PADDED[level]).to(tl.int64)
        grad = _load_gradient(grad_ptr, grad_row, grad_col, rows, columns, n, OFFSETS[level], DIMS[level])
        if RAW:
            grad = _l2norm_backward(grad, units[level], norms[level]) + carried
        else:
            grad = _l2norm_backward(grad + carried, units[level], norms[level])
        _store_transposed(grad_z_ptr, chain_row, rows, grad, OFFSETS[level] - DIMS[0], DIMS[level])
        start = STARTS[level - 1]
        carried = _combine(
            grad_z_ptr + (OFFSETS[level] - DIMS[0]) * chain_row + rows[:, None], chain_row,
            back_rows_ptr + start, back_values_ptr + start, back_counts_ptr + OFFSETS[level - 1],
            DIMS[level - 1], PADDED[level - 1], DIMS[level], True,
        )  # fmt: skip
    grad = _load_gradient(grad_ptr, grad_row, grad_col, rows, x_columns, n, 0, DIMS[0]) + carried
    _store_embedding_gradient(grad_x_ptr, rows, x_columns, n, grad, x, x_norm, DIMS[0], NORMALIZE)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=COUNTS)
def _adaptive_weights_backward(
    grad_z_ptr, chain_ptr, chain_row, n, weights_ptr, columns_ptr, values_ptr, counts_ptr, grad_weights_ptr,
    ROW_DIMS: tl.constexpr, COLUMN_DIMS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient to one row of the weights: a dot product over the batch for each entry that it selected, then through
    the row's norm to all its entries."""
    chain_row = tl.cast(chain_row, tl.int64)
    row = tl.program_id(0).to(tl.int64)
    rows, width, first, start = locate(row, ROW_DIMS, COLUMN_DIMS)
    chain_first = 0  # where what this level has read starts
    next_first = ROW_DIMS[0]
    for level in tl.static_range(1, len(ROW_DIMS)):
        chain_first = tl.where(row >= next_first, chain_first + COLUMN_DIMS[level - 1], chain_first)
        next_first += ROW_DIMS[level]

    entries = tl.arange(0, BLOCK)
    valid = entries < width
    offsets = start + (row - first) * width + entries
    w = tl.load(weights_ptr + offsets, mask=valid, other=0.0)
    norm = tl.sqrt_rn(tl.sum(w * w, 0))
    grad = tl.zeros((BLOCK,), tl.float32)
    along = 0.0  # the gradient's part along the row
    samples = tl.arange(0, BLOCK_N).to(tl.int64)
    for slot in range(tl.load(counts_ptr + row)):
        listed = start + slot * rows + (row - first)
        column = tl.load(columns_ptr + listed)
        products = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, n, BLOCK_N):
            live = begin + samples < n
            grad_z = tl.load(grad_z_ptr + row * chain_row + begin + samples, mask=live, other=0.0)
            read = tl.load(chain_ptr + (chain_first + column) * chain_row + begin + samples, mask=live, other=0.0)
            products += grad_z * read
        product = tl.sum(products, 0)
        grad = tl.where(entries == column, product, grad)
        along += product * tl.load(values_ptr + listed)
    direction = w / tl.where(norm == 0, 1.0, norm)
    scale = tl.where(norm == 0, 0.0, 1.0 / (norm + EPS))
    tl.store(grad_weights_ptr + offsets, (grad - direction * along) * scale, mask=valid)


@cache
def _adaptive_config(dims: tuple[int, ...]) -> tuple[dict, dict, dict]:
    """Constants of the adaptive kernels; those of the forward and of the backward alone, with their number of warps."""
    rows, columns = dims[1:], dims[:-1]
    padded = tuple(next_power_of_2(dim) for dim in dims)
    constants = {
        "DIMS": dims,
        "PADDED": padded,
        "OFFSETS": (0, *accumulate(dims)),
        "STARTS": (0, *accumulate(r * c for r, c in zip(rows, columns, strict=True))),
    }
    chain = cdiv(sum(dims[1:-1]), 32) * 32  # whole sectors
    forward = {"ROWS": max(1, 512 // padded[0]), "CHAIN": chain, "num_warps": max(1, padded[0] // 1024)}
    backward = {"ROWS": max(1, min(8, 4096 // padded[0])), "num_warps": 4 if padded[0] <= 512 else 8}
    return constants, forward, backward


def _transposed(units: int, samples: int, device: torch.device) -> Tensor:
    """A float32 buffer for whole programs' worth of samples, its rows aligned."""
    return torch.empty((units, cdiv(samples, 16) * 16), dtype=torch.float32, device=device)


@op("aggregate_adaptive")
def _aggregate_adaptive(
    x: Tensor, weights: list[Tensor], selection: list[Tensor], chain: str, normalize: bool
) -> Tensor:
    raw = chain == "raw"
    constants, config, _ = _adaptive_config(adaptive_dims(weights))
    units = padded_rows(x.shape[0], constants["OFFSETS"][-1], x.dtype, x.device)
    _, columns, values, counts, *_ = selection
    programs = min(cdiv(x.shape[0], config["ROWS"]), PROGRAMS * processors(x.device))
    between = torch.empty(programs * config["ROWS"] * config["CHAIN"], dtype=torch.float32, device=x.device)
    if programs:
        with on_device_of(x):
            launch(
                _adaptive_forward, (programs, 1, 1),
                (x, *x.stride(), columns, values, counts, between, units, units.stride(0), x.shape[0]),
                {**constants, **config, "RAW": raw, "NORMALIZE": normalize},
            )  # fmt: skip
    return units


@_aggregate_adaptive.register_fake
def _(x: Tensor, weights: list[Tensor], selection: list[Tensor], chain: str, normalize: bool) -> Tensor:
    return padded_rows(x.shape[0], sum(adaptive_dims(weights)), x.dtype, x.device)


@op("aggregate_adaptive_backward")
def _aggregate_adaptive_backward(
    grad: Tensor, x: Tensor, selection: list[Tensor], dims: list[int], chain: str, normalize: bool, to_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to the embeddings and to all weights in one float32 buffer (empty unless ``to_weights``)."""
    raw = chain == "raw"
    constants, _, config = _adaptive_config(tuple(dims))
    n = x.shape[0]
    rows, columns_in = tuple(dims[1:]), tuple(dims[:-1])
    weights, columns, values, counts, back_rows, back_values, back_counts = selection
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weights = torch.empty(weights.shape if to_weights else (0,), dtype=torch.float32, device=x.device)
    if n == 0:
        return grad_x, grad_weights.zero_()
    grad_z = _transposed(sum(rows), n, x.device)
    read = _transposed(sum(columns_in), n, x.device)
    with on_device_of(x):
        launch(
            _adaptive_backward, (cdiv(n, config["ROWS"]), 1, 1),
            (
                grad, *grad.stride(), x, *x.stride(), columns, values, counts,
                back_rows, back_values, back_counts, grad_x, grad_z, read, read.stride(0), n,
            ),
            {**constants, **config, "RAW": raw, "NORMALIZE": normalize},
        )  # fmt: skip
        if to_weights:
            launch(
                _adaptive_weights_backward, (sum(rows), 1, 1),
                (grad_z, read, read.stride(0), n, weights, columns, values, counts, grad_weights),
                {"ROW_DIMS": rows, "COLUMN_DIMS": columns_in, **_weights_blocks(max(columns_in)), "num_warps": 4},
            )  # fmt: skip
    return grad_x, grad_weights


def _weights_blocks(columns: int) -> dict:
    return {"BLOCK": next_power_of_2(columns), "BLOCK_N": 512}


@_aggregate_adaptive_backward.register_fake
def _(
    grad: Tensor, x: Tensor, selection: list[Tensor], dims: list[int], chain: str, normalize: bool, to_weights: bool
) -> tuple[Tensor, Tensor]:
    size = selection[0].shape if to_weights else (0,)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(
        size, dtype=torch.float32, device=x.device
    )


def _adaptive_setup(ctx, inputs, output) -> None:
    x, weights, selection, ctx.chain, ctx.normalize = inputs
    ctx.dims = list(adaptive_dims(weights))
    ctx.dtypes = [weight.dtype for weight in weights]
    ctx.to_weights = any(weight.requires_grad for weight in weights)
    ctx.save_for_backward(x, *selection)


def _adaptive_autograd(ctx, grad: Tensor):
    x, *selection = ctx.saved_tensors
    grad_x, flat = _aggregate_adaptive_backward(
        grad, x, selection, ctx.dims, ctx.chain, ctx.normalize, ctx.to_weights
    )
    grad_weights = [None] * len(ctx.dtypes)
    if ctx.to_weights:
        shapes = list(zip(ctx.dims[1:], ctx.dims, strict=False))
        grad_weights = matrices_of(flat, shapes, ctx.dtypes)
    return grad_x, grad_weights, [None] * len(selection), None, None


_aggregate_adaptive.register_autograd(_adaptive_autograd, setup_context=_adaptive_setup)


def aggregate_adaptive(
    x: Tensor, weights: Sequence[Tensor], selection: Selection, chain: str, normalize: bool = True
) -> Tensor:
    """Units ``(n, U)`` of embeddings ``x (n, d)`` by what the rows of ``weights`` have selected.

    Like :func:`aggregate_heuristic`. Values come from ``selection``, made by ``select(weights)``; the gradient goes to
    ``x`` and to the raw ``weights (d_l, d_{l-1})``, for which it takes two float32 buffers of the units' size.
    """
    return _aggregate_adaptive(x, list(weights), list(selection), chain, normalize)


def compile_cases() -> list[CompileCase]:
    """5,000 embeddings of d=512 with s=2, L=8; other sizes of embeddings and windows, and the float32 path."""
    embeddings = {"x_ptr": "*bf16", "x_row": "i64", "x_col": "constexpr", "n": "i32"}
    gradients = {"grad_ptr": "*bf16", "grad_row": "i64", "grad_col": "constexpr", "grad_x_ptr": "*bf16"}
    units = {"units_ptr": "*bf16", "units_row": "i64"}
    lists = {"columns_ptr": "*i32", "values_ptr": "*fp32", "counts_ptr": "*i32"}
    back = {"back_rows_ptr": "*i32", "back_values_ptr": "*fp32", "back_counts_ptr": "*i32"}

    def case(name, kernel, signature, constants, warps, *, dtype="bf16", flops=0.0, size=0.0) -> CompileCase:
        signature = {key: value.replace("bf16", dtype) for key, value in signature.items()}
        strides = {key: 1 for key in ("x_col", "grad_col") if key in signature}
        signature = {key: value for key, value in signature.items() if key not in strides}
        aligned = tuple(key for key in signature if key != "n" and key not in COUNTS)
        return CompileCase(
            name, kernel, signature, {**constants, **strides}, warps, 3, divisible=aligned,
            flops=flops, bytes=size, precision="fp32",
        )  # fmt: skip

    found = []
    shapes = ((512, 2, 8, "bf16"), (512, 2, 8, "fp32"), (1152, 2, 8, "bf16"), (768, 3, 5, "bf16"))
    for dim, size, levels, dtype in shapes:
        constants, warps = _heuristic_config(dim, size, levels)
        count = 5000 * constants["OFFSETS"][-1]
        width = 4 if dtype == "fp32" else 2
        for chain in CHAINS:
            flags = {"RAW": chain == "raw", "NORMALIZE": True}
            forward = {**embeddings, **units, "taps_ptr": "*fp32"}
            backward = {**embeddings, **gradients, "taps_ptr": "*fp32", "partial_ptr": "*fp32"}
            name = f"{dim}_s{size}_{chain}_{dtype}"
            found += [
                case(
                    f"heuristic_forward_{name}", _heuristic_forward, forward, {**constants, **flags}, warps,
                    dtype=dtype, flops=4 * count, size=width * (5000 * dim + count),
                ),
                case(
                    f"heuristic_backward_{name}", _heuristic_backward, backward, {**constants, **flags}, warps,
                    dtype=dtype, flops=12 * count, size=width * (10000 * dim + count),
                ),
            ]  # fmt: skip
    for dim, dtype, chains in ((512, "bf16", CHAINS), (1152, "fp32", CHAINS[:1])):
        dims = tuple(dim >> level for level in range(9))
        constants, forward_config, backward_config = ({**part} for part in _adaptive_config(dims))
        warps = forward_config.pop("num_warps"), backward_config.pop("num_warps")
        rows, columns = dims[1:], dims[:-1]
        count = 5000 * sum(dims)
        width = 4 if dtype == "fp32" else 2
        for chain in chains:
            flags = {"RAW": chain == "raw", "NORMALIZE": True}
            scratch = {"chain_ptr": "*fp32", "chain_row": "i32"}
            forward = {**embeddings, **units, **lists, "chain_ptr": "*fp32"}
            backward = {**embeddings, **gradients, **lists, **back, **scratch, "grad_z_ptr": "*fp32"}
            name = f"{dim}_{chain}_{dtype}"
            found += [
                case(
                    f"adaptive_forward_{name}", _adaptive_forward, forward,
                    {**constants, **forward_config, **flags}, warps[0],
                    dtype=dtype, flops=4 * count, size=width * (5000 * dim + count),
                ),
                case(
                    f"adaptive_backward_{name}", _adaptive_backward, backward,
                    {**constants, **backward_config, **flags}, warps[1],
                    dtype=dtype, flops=12 * count, size=width * (10000 * dim + count) + 8 * count,
                ),
            ]  # fmt: skip
        found.append(
            case(
                f"adaptive_weights_backward_{dim}", _adaptive_weights_backward,
                {
                    **scratch, **lists, "n": "i32",
                    "grad_z_ptr": "*fp32", "weights_ptr": "*fp32", "grad_weights_ptr": "*fp32",
                },
                {"ROW_DIMS": rows, "COLUMN_DIMS": columns, **_weights_blocks(dim)}, 4,
                flops=4 * 5000 * sum(rows), size=16 * 5000 * sum(rows),
            )
        )  # fmt: skip
    return found
