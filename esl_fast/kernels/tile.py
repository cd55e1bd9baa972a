"""The tile main loop that every all-pairs kernel shares.

``tile_product`` gives one fp32 tile of ``a (n, units) @ b (m, units)^T``; kernels differ in what they do with it.
Two kernels given the same :class:`esl_fast.kernels.plan.Plan` compute bitwise the same tile, so scores may be compared
across kernels.
"""

import triton
import triton.language as tl


@triton.jit
def row_product(
    acc, x_row, y_row, units, a_unit, b_unit, DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """``acc`` and the product of rows that start at ``x_row (rows, 1)`` and ``y_row (columns, 1)``, none masked."""
    offset = tl.arange(0, DEPTH).to(tl.int64)
    whole = units // DEPTH * DEPTH
    for k in range(0, whole, DEPTH):
        x = tl.load(x_row + (k + offset)[None, :] * a_unit)
        y = tl.load(y_row + (k + offset)[None, :] * b_unit)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    if whole < units:
        inside = (whole + offset < units)[None, :]
        x = tl.load(x_row + (whole + offset)[None, :] * a_unit, mask=inside, other=0.0)
        y = tl.load(y_row + (whole + offset)[None, :] * b_unit, mask=inside, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_product(
    a, b, row, col, n, m, units, a_row, a_unit, b_row, b_unit,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``a[row : row + ROWS] @ b[col : col + COLS]^T`` in fp32; what lies past ``n`` or ``m`` is finite rubbish."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if TMA:
        for k in range(0, units, DEPTH):
            x = a.load([row.to(tl.int32), k])
            y = b.load([col.to(tl.int32), k])
            if UPCAST:
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            acc = tl.dot(x, y.T, acc, input_precision=PRECISION)
    else:
        # Rows past the end repeat the last one: loads of a whole step then need no mask and stay 128 bits wide.
        x_row = a + tl.minimum(tl.arange(0, ROWS).to(tl.int64) + row, n - 1)[:, None] * a_row
        y_row = b + tl.minimum(tl.arange(0, COLS).to(tl.int64) + col, m - 1)[:, None] * b_row
        acc = row_product(acc, x_row, y_row, units, a_unit, b_unit, DEPTH, PRECISION, UPCAST)
    return acc


@triton.jit
def tile_origin(tile, row_blocks, col_blocks, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of tile number ``tile``: down ``GROUP`` row blocks, then on to the next column block.

    Blocks are counted in 32 bits (a division in 64 takes a hundred instructions), rows and columns in 64.
    """
    group = tile // (GROUP * col_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = tile - group * GROUP * col_blocks
    return (group * GROUP + within % height).to(tl.int64) * ROWS, (within // height).to(tl.int64) * COLS


@triton.jit
def sweep_length(blocks, group, groups):
    """How many of ``blocks`` blocks are number ``group`` modulo ``groups``."""
    return (blocks - group + groups - 1) // groups


@triton.jit
def sweep_origin(
    tile, sweep, row_group, col_group, row_groups, col_groups, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """First row and column of a program's ``tile``-th tile: down ``sweep`` row blocks, then to its next column block.

    Blocks are counted in 32 bits (a division in 64 takes a hundred instructions), rows and columns in 64.
    """
    row = (row_group + tile % sweep * row_groups).to(tl.int64) * ROWS
    return row, (col_group + tile // sweep * col_groups).to(tl.int64) * COLS


@triton.jit
def sum_own_rows(tile, WARPS: tl.constexpr):
    """The columns' sums over the rows that one thread holds: a sixteenth of the way, without any exchange.

    Warps lie along the rows, 16 of these apart, and a thread holds rows r and r + 8 of a warp's 16. Elsewhere the
    layout differs, and this is merely a sum over some rows.
    """
    parts = tl.reshape(tile, (tile.shape[0] // (16 * WARPS), WARPS, 2, 8, tile.shape[1]))
    return tl.reshape(tl.sum(tl.sum(parts, 2), 0), (8 * WARPS, tile.shape[1]))


@triton.jit
def sum_own_cols(tile):
    """The rows' sums over the columns that one thread holds, in four parts a row: a thread holds two in eight."""
    parts = tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 4, 2))
    return tl.sum(tl.sum(parts, 3), 1)


@triton.jit
def halves(tile):
    """Left and right half of the columns; the halves stay in the registers they are in."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """The columns in four parts. An epilogue with several values a column spills if it takes them all at once."""
    left, right = halves(tile)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def eighths(tile):
    """The columns in eight parts."""
    left, right = halves(tile)
    a, b, c, d = quarters(left)
    e, f, g, h = quarters(right)
    return a, b, c, d, e, f, g, h
