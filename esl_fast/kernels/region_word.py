"""Region-word similarity: products of words and regions in blocks of fixed size, each reduced by one kernel.

A block of products (some captions x some images) is formed by cuBLAS in a buffer of 256 MB, and a kernel reduces it to
scores at once; only scores are kept. Both sides are packed without padding: words of captions sorted by length one
after another, regions region-major, `(R, images)`. A program of the kernel takes one caption and 8 to 32 images: images
are lanes, words lie in registers, and it walks the regions, twice forward and three times backward. So

- any R costs exactly R steps, and a caption costs its length rounded up to 8, 16, 32, 64 or 128;
- reductions over regions are sums over steps, those over words stay inside a warp for captions of up to 32 words: no
  padded segments, no barrier;
- norms over words are known within a step; those over regions only after the first walk, hence the second.

Reducing inside the tile of the product instead was written and compiled first. Its columns (36 = 32 + 4 regions) and
captions of uneven length need several register layouts at once; Triton 3.9 then converts whole tiles between them and
spills (1.4 KB a thread at 128 x 144, 0.5 KB at 64 x 80), and padding both to powers of two would waste over half of the
product.

Softmaxes subtract their maximum, over regions in a walk of its own, only if |smooth| > 64 or so; below that
|b / norm| <= 1 keeps exponentials within float32. Loads have no masks: they would take as many instructions as tanh.

Backward forms the products anew, overwrites them by their gradients, and leaves the two products that follow to cuBLAS.

Paper, T words x C regions x U units: 2 T C U FLOP in the product, written once and read twice, 6 special functions and
some 40 other instructions an element in the kernel. 1,000 x 5,000, 36 regions, 8 to 20 words, U = 1022, bf16: 5.2
TFLOP, 6.5 ms at 790 TFLOP/s; the products are 5 GB, in all 15 GB or 3.1 ms at 4.8 TB/s; captions padded to 8, 16 or 32
words make 3.6 G elements of them: 22 G special functions, 5.8 ms at 16 a clock and SM, and 5.5 ms of instructions.
Measured on an H200: 9.7 ms for the kernel, 6.8 for the products. Backward: three times the FLOP, three walks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast import reference
from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import PADDING, cdiv, next_power_of_2, on_device_of
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op

EPS = tl.constexpr(reference.region_word.EPS)
SLOPE = tl.constexpr(reference.region_word.SLOPE)
STEEP = tl.constexpr(10.0)
LOG2E = tl.constexpr(1.4426950408889634)
TWO_LOG2E = tl.constexpr(2.8853900817779268)
LIMIT = tl.constexpr(92.0)  # of sharpness: 2^92 times a caption's or an image's parts is a float32
MAX_WORDS = 128
FEWEST_LANES, MOST_LANES = 8, 32
SMALLEST = 8
BLOCK_BYTES = 256 << 20  # products that are reduced before the next ones are formed
BLOCK_IMAGES = 448
GRADIENT_BYTES = 256 << 20  # gradients of products held at a time
RUNTIME = ["images", "regions", "first_image", "first_caption", "image_blocks", "block_row"]
MOVING = ["block", "partial"]  # pointers into a buffer, aligned or not from block to block


class Packing(NamedTuple):
    """Where the words of each caption go; depends on `word_lengths` and W only. Made by :func:`pack_captions`."""

    order: Tensor  # (M,) int64: captions by length
    lengths: Tensor  # (M,) int32: number of words, in that order
    offsets: Tensor  # (M,) int64: row of the first word, in that order
    rows: Tensor  # (T,) int64: which row of `word_units.view(M * W, U)` each row is
    histogram: list[int]  # captions of 0, 1, ... W words; empty: not known on the host, captions take W rows each


def pack_captions(word_lengths: Tensor, max_words: int, device: torch.device, *, wait: bool = False) -> Packing:
    """Pack captions of `word_lengths (M,)`, each of at most `max_words` (the W of `word_units`) words, for `device`.

    Lengths on the CPU are packed exactly, without waiting for a GPU. Lengths on a GPU are packed exactly if `wait`
    (one synchronisation; do it once for a gallery), else every caption takes W rows, whose padding is multiplied too.
    Lengths below 1 count as 1, those above W as W.
    """
    if torch.compiler.is_compiling() or (word_lengths.device.type != "cpu" and not wait):
        lengths = word_lengths.to(device, torch.int32).clamp(1, max_words)
        order = torch.arange(len(lengths), device=device)
        return Packing(order, lengths, order * max_words, torch.arange(len(lengths) * max_words, device=device), [])
    _check_readable("word_lengths", word_lengths, device)
    lengths = word_lengths.cpu().long().clamp(1, max_words)
    order = lengths.argsort(stable=True)
    by_length = lengths[order]
    rows = (order[:, None] * max_words + torch.arange(max_words))[torch.arange(max_words) < by_length[:, None]]
    tensors = (order, by_length.int(), by_length.cumsum(0) - by_length, rows)
    histogram = torch.bincount(lengths, minlength=max_words + 1).tolist()
    return Packing(*(t.to(device, non_blocking=True) for t in tensors), histogram)


def _check_readable(name: str, lengths: Tensor, device: torch.device) -> None:
    """RuntimeError in a CUDA graph's capture: a replay would read the host's memory again, where others are by then."""
    if device.type != "cuda" or lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} lies on the CPU, where a CUDA graph cannot read it; expected it on {device}")


@triton.jit
def _inverse(x):
    """``1 / x`` of positive x: one instruction and a product, where a division takes eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _tanh_complement(a):
    """``1 - tanh(a)``."""
    return _inverse(0.5 + tl.exp2(a * TWO_LOG2E - 1.0))


@triton.jit
def _activate(products, offset, one, EXACT: tl.constexpr):
    """Products of one region and their ``leaky_relu(tanh(.))``.

    ``one`` is ``_tanh_complement(0)`` as the GPU rounds it: zeros give 0, or what a fused product leaves of it, far
    below EPS; of more, a norm would be made. Where all products are below 1e-4 or so their last digits are lost. (A
    `where` would keep them, but it makes loads wait for each other, and the kernel take twice as long.)
    """
    a = tl.load(products + offset).to(tl.float32)
    t = one - _tanh_complement(a)
    if EXACT:  # the difference loses the digits of a small product
        square = a * a
        series = 62.0 / 2835.0
        series = series * square - 17.0 / 315.0
        series = series * square + 2.0 / 15.0
        series = series * square - 1.0 / 3.0
        series = series * square + 1.0
        t = tl.where(square < 0.0625, a * series, t)
    return a, tl.maximum(t, SLOPE * t)


@triton.jit
def _word_scale(b, real):
    """``1 / (norm over words + eps)``, one a lane."""
    return 1.0 / (tl.sqrt(tl.sum(b * real * b, 0)) + EPS)


@triton.jit
def _word_powers(b, sharpness, real, steep):
    """Softmax over words of ``b * sharpness`` in base 2, times its sum, and that sum, one a lane."""
    logits = b * sharpness
    if steep:
        logits = tl.where(real > 0, logits, -float("inf"))
        logits -= tl.max(logits, 0)[None, :]
    powers = tl.exp2(logits) * real
    return powers, tl.sum(powers, 0)


@triton.jit
def _first_walk(
    products, offset, regions, step, real, regions_of, one, sharpness, steep, LENGTHS: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """By word and image: shift, sum of weights and weighted sum of ``a`` of the softmax over regions; region scale."""
    shift = tl.zeros(offset.shape, tl.float32)
    if steep:
        shift += -float("inf")
        for r in range(0, regions):
            _, b = _activate(products + r * step, offset, one, EXACT)
            logits = b * (sharpness * _word_scale(b, real))[None, :]
            shift = tl.maximum(shift, tl.where((r < regions_of)[None, :], logits, -float("inf")))
    weight = tl.zeros(offset.shape, tl.float32)
    weighted = tl.zeros(offset.shape, tl.float32)
    square = tl.zeros(offset.shape, tl.float32)
    for r in range(0, regions):
        a, b = _activate(products + r * step, offset, one, EXACT)
        e = tl.exp2(b * (sharpness * _word_scale(b, real))[None, :] - shift)
        if LENGTHS:
            inside = (r < regions_of)[None, :]
            e = tl.where(inside, e, 0.0)
            b = tl.where(inside, b, 0.0)
        weight += e
        weighted += a * e
        square += b * b
    return shift, weight, weighted, 1.0 / (tl.sqrt(square) + EPS)


@triton.jit
def _place(
    block, smooth_ptr, lengths, offsets, region_lengths,
    images, regions, first_image, first_caption, image_blocks, block_row,
    WORDS: tl.constexpr, IMAGES: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """What one program reduces: its caption (in packed order), images, their products; what of it is real.

    Loads need no mask: words past the last repeat it, and ``real`` is 0 for them, else 1; images past the last read
    whatever follows (launchers leave room behind the block) and are not stored.
    """
    program = tl.program_id(0).to(tl.int64)
    caption = first_caption.to(tl.int64) + program // image_blocks
    word = tl.arange(0, WORDS)
    first = program % image_blocks * IMAGES
    image = first + tl.arange(0, IMAGES)
    length = tl.load(lengths + caption)
    row = tl.load(offsets + caption) - tl.load(offsets + first_caption.to(tl.int64))
    live_image = image < images
    regions_of = tl.full((IMAGES,), 0, tl.int32) + regions
    if LENGTHS:
        regions_of = tl.load(region_lengths + first_image.to(tl.int64) + image, mask=live_image, other=1).to(tl.int32)
    # Launchers keep WORDS rows below 2^31 elements, so that offsets within a caption take one register.
    products = block + row * block_row.to(tl.int64) + first
    offset = tl.minimum(word, length - 1)[:, None] * block_row + tl.arange(0, IMAGES)[None, :]
    real = tl.where(word < length, 1.0, 0.0)[:, None] + tl.zeros((WORDS, IMAGES), tl.float32)
    smooth = tl.load(smooth_ptr).to(tl.float32)
    one = _tanh_complement(0.0 * smooth)  # of a constant the compiler would make it, without the GPU's rounding
    return caption, length, image, regions_of, products, offset, real, live_image, smooth, one


@triton.jit(do_not_specialize=[*RUNTIME, "out_row", "out_col"], do_not_specialize_on_alignment=MOVING)
def _reduce(
    block, smooth_ptr, order, lengths, offsets, region_lengths, out, out_row, out_col,
    images, regions, first_image, first_caption, image_blocks, block_row,
    WORDS: tl.constexpr, IMAGES: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Scores of captions ``first_caption + i`` (packed order) and ``images`` images from their block of products."""
    caption, length, image, regions_of, products, offset, real, live_image, smooth, one = _place(
        block, smooth_ptr, lengths, offsets, region_lengths,
        images, regions, first_image, first_caption, image_blocks, block_row, WORDS, IMAGES, LENGTHS,
    )  # fmt: skip
    sharpness = smooth * LOG2E
    steep = tl.abs(sharpness) > LIMIT
    step = images
    _, weight, weighted, region_scale = _first_walk(
        products, offset, regions, step, real, regions_of, one, sharpness, steep, LENGTHS, EXACT
    )
    by_regions = tl.zeros((IMAGES,), tl.float32)
    for r in range(0, regions):
        a, b = _activate(products + r * step, offset, one, EXACT)
        powers, total = _word_powers(b, sharpness * region_scale, real, steep)
        attended = tl.sum(a * powers, 0) / total
        if LENGTHS:
            attended = tl.where(r < regions_of, attended, 0.0)
        by_regions += attended
    by_words = tl.sum(weighted / weight * real, 0)
    score = by_words / length.to(tl.float32) + by_regions / regions_of.to(tl.float32)
    row = (first_image.to(tl.int64) + image) * out_row.to(tl.int64)
    tl.store(out + row + tl.load(order + caption) * out_col.to(tl.int64), score, mask=live_image)


@triton.jit
def _regions_gradient(a, b, sharpness, real, steep, grad):
    """Weights of regions over words times the gradient to their means; gradient to what the softmax is taken of."""
    powers, total = _word_powers(b, sharpness, real, steep)
    mean = tl.sum(a * powers, 0) / total
    weights = powers * (grad / total)[None, :]
    return weights, weights * (a - mean[None, :])


@triton.jit
def _through_norm(scale, dot, lone):
    """``(s, t)`` of which ``grad * s - b * t`` is the gradient to ``b``, given ``grad``, that to ``b * scale``.

    ``scale = 1 / (norm + eps)``; ``dot``, the sum of ``b * grad`` over that norm's axis, is 0 where the norm is. Where
    ``b`` is the ``lone`` one on that axis only the epsilon's term is left, which rounding would bury.
    """
    norm = 1.0 / scale - EPS
    along = dot * scale * scale / tl.where(norm > 0, norm, 1.0)
    return _unless_lone(scale, lone), tl.where(lone, 0.0, along)


@triton.jit
def _unless_lone(scale, lone):
    return tl.where(lone, scale * (scale * EPS), scale)


@triton.jit(
    do_not_specialize=[*RUNTIME, "row_words", "grad_row", "grad_col"], do_not_specialize_on_alignment=MOVING
)
def _reduce_backward(
    block, smooth_ptr, order, lengths, offsets, region_lengths, grad_ptr, grad_row, grad_col, partial,
    images, regions, row_words, first_image, first_caption, image_blocks, block_row,
    WORDS: tl.constexpr, IMAGES: tl.constexpr, LENGTHS: tl.constexpr, EXACT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Overwrite a block of products by their gradients; ``partial`` takes each program's share of that to smooth."""
    caption, length, image, regions_of, products, offset, real, live_image, smooth, one = _place(
        block, smooth_ptr, lengths, offsets, region_lengths,
        images, regions, first_image, first_caption, image_blocks, block_row, WORDS, IMAGES, LENGTHS,
    )  # fmt: skip
    sharpness = smooth * LOG2E
    steep = tl.abs(sharpness) > LIMIT
    step = images
    shift, weight, weighted, region_scale = _first_walk(
        products, offset, regions, step, real, regions_of, one, sharpness, steep, LENGTHS, EXACT
    )
    inverse = real / weight
    mean = weighted * inverse
    place = (first_image.to(tl.int64) + image) * grad_row.to(tl.int64)
    place += tl.load(order + caption) * grad_col.to(tl.int64)
    grad = tl.load(grad_ptr + place, mask=live_image, other=0.0).to(tl.float32)
    inverse *= (grad / length.to(tl.float32))[None, :]
    grad_region = grad / regions_of.to(tl.float32)

    region_dot = tl.zeros(offset.shape, tl.float32)
    for r in range(0, regions):
        a, b = _activate(products + r * step, offset, one, EXACT)
        grad_here = tl.where(r < regions_of, grad_region, 0.0)
        _, to_words = _regions_gradient(a, b, sharpness * region_scale, real, steep, grad_here)
        region_dot += to_words * b
    grad_smooth = tl.sum(region_dot * region_scale, 0)
    lone_region = (regions_of == 1)[None, :]
    _, region_along = _through_norm(region_scale, region_dot, lone_region)

    word = tl.arange(0, WORDS)
    written = (word < (row_words if PADDED else length))[:, None] & live_image[None, :]
    # Not `offset`: what repeats the last word must not overwrite it.
    place = word[:, None] * block_row + tl.arange(0, IMAGES)[None, :]
    for r in range(0, regions):
        a, b = _activate(products + r * step, offset, one, EXACT)
        scale = _word_scale(b, real)
        e = tl.exp2(b * (sharpness * scale)[None, :] - shift)
        grad_here = grad_region
        if LENGTHS:
            inside = r < regions_of
            e = tl.where(inside[None, :], e, 0.0)
            grad_here = tl.where(inside, grad_region, 0.0)
        p = e * inverse
        to_regions = p * (a - mean)
        q, to_words = _regions_gradient(a, b, sharpness * region_scale, real, steep, grad_here)
        word_dot = tl.sum(to_regions * b, 0)
        grad_smooth += word_dot * scale
        word_scale, word_along = _through_norm(scale, word_dot, length == 1)
        grad_b = to_regions * word_scale[None, :] + to_words * _unless_lone(region_scale, lone_region)
        grad_b -= b * (word_along[None, :] + region_along)
        t = tl.where(a > 0, b, b * STEEP)
        grad_a = p + q + grad_b * smooth * tl.where(a > 0, 1.0, SLOPE) * (1.0 - t * t)
        grad_a *= real
        if LENGTHS:
            grad_a = tl.where(inside[None, :], grad_a, 0.0)
        tl.store(products + r * step + place, grad_a.to(block.dtype.element_ty), mask=written)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(live_image, grad_smooth, 0.0), 0))


class Block(NamedTuple):
    """Captions ``first .. first + count`` in packed order, of at most ``words`` words, and their rows."""

    first: int
    count: int
    words: int
    row: int
    rows: int


def caption_blocks(packing: Packing, max_words: int, max_rows: int) -> list[Block]:
    """Blocks of captions whose words round up to the same power of two, of at most `max_rows` rows (or one caption)."""
    if not packing.histogram:
        runs = [(max_words, len(packing.order))]
    else:
        runs = [(length, count) for length, count in enumerate(packing.histogram) if count]
    blocks: list[Block] = []
    first = row = 0
    for length, count in runs:
        words = max(SMALLEST, next_power_of_2(length))
        while count:
            last = blocks[-1] if blocks else None
            if last is None or last.words != words or last.rows + length > max_rows:
                blocks.append(Block(first, 0, words, row, 0))
                last = blocks[-1]
            taken = min(count, max(1, (max_rows - last.rows) // max(length, 1)))
            blocks[-1] = last._replace(count=last.count + taken, rows=last.rows + taken * length)
            first, row, count = first + taken, row + taken * length, count - taken
    return blocks


def _tile(words: int, images: int) -> tuple[int, int]:
    """Images a program takes, and its warps: each has 256 products a region, 8 of them a thread."""
    lanes = min(max(FEWEST_LANES, 256 // words), next_power_of_2(images))
    return lanes, max(1, words * lanes // 256)


@triton.jit(do_not_specialize=["width", "group", "outer_stride"], do_not_specialize_on_alignment=["rows"])
def _gather_kernel(
    units, rows, out, width, group, outer_stride, inner_stride, unit_stride, out_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = units[rows[i] // group, rows[i] % group]``, zeros from ``width`` on and where ``rows[i]`` is -1."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + program)
    unit = tl.arange(0, BLOCK)
    end = tl.where(row >= 0, width, 0)
    start = units + row // group * outer_stride + row % group * inner_stride
    values = tl.load(start + unit.to(tl.int64) * unit_stride, mask=unit < end, other=0.0)
    tl.store(out + program * out_row + unit, values, mask=unit < out_row)


def _gather(units: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows (n,)`` of ``units.view(-1, U)``, ``(n, U)`` and zeros up to a multiple of 64, for cuBLAS.

    Row -1 is zeros throughout.
    """
    _, group, width = units.shape
    out = torch.empty((len(rows), cdiv(width, PADDING) * PADDING), dtype=units.dtype, device=units.device)
    with on_device_of(units):
        launch(
            _gather_kernel, (len(rows), 1, 1),
            (units, rows, out, width, group, *units.stride(), out.stride(0)),
            {"BLOCK": next_power_of_2(out.shape[1]), "num_warps": 4},
        )  # fmt: skip
    return out


def _gather_regions(region_units: Tensor, first: int, images: int, lengths: Tensor | None) -> Tensor:
    """Regions of ``images`` images from ``first`` on, region-major ``(R * images, U)``, as :func:`_gather`.

    Regions past ``lengths`` are zeros, whatever they hold.
    """
    regions = region_units.shape[1]
    region = torch.arange(regions, device=region_units.device)[:, None]
    rows = region + torch.arange(images, device=region_units.device) * regions
    if lengths is not None:
        rows = torch.where(region < lengths[first : first + images], rows, -1)
    return _gather(region_units[first : first + images], rows.view(-1))


def _exact(x: Tensor) -> bool:
    return x.dtype == torch.float32


@op("region_word")
def _forward(
    region_units: Tensor, word_units: Tensor, smooth: Tensor, region_lengths: Tensor | None,
    order: Tensor, lengths: Tensor, offsets: Tensor, rows: Tensor, histogram: list[int],
) -> Tensor:  # fmt: skip
    packing = Packing(order, lengths, offsets, rows, histogram)
    (n, regions, _), (m, max_words, _) = region_units.shape, word_units.shape
    out = torch.empty((n, m), dtype=torch.float32, device=region_units.device)
    if n == 0 or m == 0:
        return out
    block_images = min(n, BLOCK_IMAGES)
    elements = BLOCK_BYTES // region_units.element_size()
    blocks = caption_blocks(packing, max_words, max(MAX_WORDS, elements // (regions * block_images)))
    buffer = region_units.new_empty(max(b.rows for b in blocks) * regions * block_images + MOST_LANES)
    for first in range(0, n, block_images):
        images = min(block_images, n - first)
        columns = _gather_regions(region_units, first, images, region_lengths)
        for block in blocks:
            lanes, warps = _tile(block.words, images)
            image_blocks = cdiv(images, lanes)
            words = _gather(word_units, packing.rows[block.row : block.row + block.rows])
            products = buffer[: block.rows * len(columns)].view(block.rows, len(columns))
            torch.mm(words, columns.mT, out=products)
            with on_device_of(region_units):
                launch(
                    _reduce, (block.count * image_blocks, 1, 1),
                    (
                        products, smooth, order, lengths, offsets, region_lengths, out, out.stride(0), out.stride(1),
                        images, regions, first, block.first, image_blocks, len(columns),
                    ),
                    {
                        "WORDS": block.words, "IMAGES": lanes, "LENGTHS": region_lengths is not None,
                        "EXACT": _exact(region_units), "num_warps": warps,
                    },
                )  # fmt: skip
    return out


@_forward.register_fake
def _(region_units, word_units, smooth, region_lengths, order, lengths, offsets, rows, histogram):
    return region_units.new_empty(region_units.shape[0], word_units.shape[0], dtype=torch.float32)


@op("region_word_backward")
def _backward(
    grad: Tensor, region_units: Tensor, word_units: Tensor, smooth: Tensor, region_lengths: Tensor | None,
    order: Tensor, lengths: Tensor, offsets: Tensor, rows: Tensor, histogram: list[int],
    for_regions: bool, for_words: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to regions, words (empty where not wanted) and smooth."""
    packing = Packing(order, lengths, offsets, rows, histogram)
    (n, regions, width), (m, max_words, _) = region_units.shape, word_units.shape
    device, dtype = region_units.device, region_units.dtype
    grad_regions = torch.empty(region_units.shape if for_regions else (0,), dtype=dtype, device=device)
    total = len(rows)
    if n == 0 or total == 0:
        zeros = torch.zeros(word_units.shape if for_words else (0,), dtype=dtype, device=device)
        return grad_regions.zero_(), zeros, torch.zeros_like(smooth)
    if not histogram:  # gradients of padding are 0, but 0 times a NaN is not
        real = torch.arange(max_words, device=device) < lengths[:, None]
        rows = torch.where(real.view(-1), rows, -1)
    words = _gather(word_units, rows)
    most_columns = min(GRADIENT_BYTES // (region_units.element_size() * total), 2**31 // (2 * MAX_WORDS))
    block_images = most_columns // regions
    block_images = max(1, min(n, block_images))
    blocks = caption_blocks(packing, max_words, total)
    several = n > block_images
    row_dtype = torch.float32 if several else dtype
    grad_rows = torch.zeros((total, words.shape[1]) if for_words else (0, 0), dtype=row_dtype, device=device)
    programs = sum(block.count * cdiv(block_images, _tile(block.words, block_images)[0]) for block in blocks)
    partial = torch.zeros((cdiv(n, block_images), programs), dtype=torch.float32, device=device)
    buffer = torch.empty(total * regions * block_images + MOST_LANES, dtype=dtype, device=device)
    for index, first in enumerate(range(0, n, block_images)):
        images = min(block_images, n - first)
        columns = _gather_regions(region_units, first, images, region_lengths)
        products = buffer[: total * len(columns)].view(total, len(columns))
        torch.mm(words, columns.mT, out=products)
        program = 0
        for block in blocks:
            lanes, warps = _tile(block.words, images)
            image_blocks = cdiv(images, lanes)
            with on_device_of(region_units):
                launch(
                    _reduce_backward, (block.count * image_blocks, 1, 1),
                    (
                        products[block.row :], smooth, order, lengths, offsets, region_lengths,
                        grad, grad.stride(0), grad.stride(1), partial[index, program:],
                        images, regions, max_words, first, block.first, image_blocks, len(columns),
                    ),
                    {
                        "WORDS": block.words, "IMAGES": lanes, "LENGTHS": region_lengths is not None,
                        "EXACT": _exact(region_units), "PADDED": not histogram, "num_warps": warps,
                    },
                )  # fmt: skip
            program += block.count * image_blocks
        if for_regions:
            to_regions = torch.mm(products.mT, words).view(regions, images, -1)[..., :width]
            grad_regions[first : first + images] = to_regions.transpose(0, 1)
        if for_words and several:
            grad_rows += torch.mm(products, columns)
        elif for_words:
            torch.mm(products, columns, out=grad_rows)
    grad_rows = grad_rows[:, :width].to(dtype)
    if not for_words:
        grad_words = grad_rows.view(0)
    elif histogram:
        grad_words = torch.zeros((m * max_words, width), dtype=dtype, device=device).index_copy_(0, rows, grad_rows)
        grad_words = grad_words.view(m, max_words, width)
    else:
        grad_words = grad_rows.reshape(m, max_words, width)
    return grad_regions, grad_words, partial.sum().to(smooth.dtype).reshape(smooth.shape)


@_backward.register_fake
def _(grad, region_units, word_units, smooth, region_lengths, *packing_and_wanted):
    *_, for_regions, for_words = packing_and_wanted
    grad_regions = region_units.new_empty(region_units.shape if for_regions else (0,))
    grad_words = word_units.new_empty(word_units.shape if for_words else (0,))
    return grad_regions, grad_words, torch.empty_like(smooth)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.histogram = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    wanted = ctx.needs_input_grad[:3]
    grads = _backward(grad, *ctx.saved_tensors, ctx.histogram, *wanted[:2])
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def region_word_similarity(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    packing: Packing | None = None,
) -> Tensor:
    """As :func:`esl_fast.reference.region_word.region_word_similarity`, scores in float32; `smooth` is 0-d.

    `region_units (N, R, U)` and `word_units (M, W, U)` are float32, bfloat16 or float16, both of one dtype, W at most
    128. `packing` is what :func:`pack_captions` made of `word_lengths`.
    """
    if packing is None:
        packing = pack_captions(word_lengths, word_units.shape[1], region_units.device)
    if region_lengths is not None:
        _check_readable("region_lengths", region_lengths, region_units.device)
        region_lengths = region_lengths.to(region_units.device, non_blocking=True).contiguous()
    return _forward(region_units, word_units, smooth, region_lengths, *packing)


def compile_cases() -> list[CompileCase]:
    """What the launchers run, by words a caption."""
    pointers = {"block": "*bf16", "smooth_ptr": "*fp32", "order": "*i64", "lengths": "*i32", "offsets": "*i64",
                "region_lengths": "*i64"}  # fmt: skip
    sizes = dict.fromkeys(("images", "regions", "first_image", "first_caption", "image_blocks", "block_row"), "i32")
    forward = {**pointers, "out": "*fp32", "out_row": "i32", "out_col": "i32", **sizes}
    backward = {**pointers, "grad_ptr": "*fp32", "grad_row": "i32", "grad_col": "i32", "partial": "*fp32",
                **sizes, "row_words": "i32"}  # fmt: skip
    aligned = tuple(name for name, kind in (forward | backward).items() if kind[0] == "*" and name not in MOVING)
    cases = []
    for dtype, words in (("bf16", 8), ("bf16", 16), ("bf16", 32), ("bf16", 128), ("fp32", 16), ("fp32", 128)):
        lanes, warps = _tile(words, BLOCK_IMAGES)
        constants = {"WORDS": words, "IMAGES": lanes, "LENGTHS": True, "EXACT": dtype == "fp32"}
        for name, kernel, signature in (("forward", _reduce, forward), ("backward", _reduce_backward, backward)):
            if kernel is _reduce_backward:
                constants = {**constants, "PADDED": False}
            # One block: BLOCK_IMAGES images of 36 regions and as many captions as fill it.
            elements = BLOCK_BYTES // (4 if dtype == "fp32" else 2)
            passes = 2 if kernel is _reduce else 4  # the backward's last walk reads and writes
            case = CompileCase(
                f"{name}-{dtype}-{words}",
                kernel,
                {**signature, "block": f"*{dtype}"},
                constants,
                warps,
                num_stages=3,
                divisible=tuple(name for name in aligned if name in signature),
                flops=25.0 * passes * elements,
                bytes=float(passes * BLOCK_BYTES),
                precision="fp32",
            )
            cases.append(case)
    gather = CompileCase(
        "gather_13k",
        _gather_kernel,
        {"units": "*bf16", "rows": "*i64", "out": "*bf16", "width": "i32", "group": "i32",
         "outer_stride": "i32", "inner_stride": "i32", "out_row": "i32"},
        {"BLOCK": 1024, "unit_stride": 1},
        num_warps=4,
        num_stages=3,
        divisible=("units", "out", "inner_stride", "out_row"),
        bytes=4.0 * 1024 * 13_000,
        precision="fp32",
    )  # fmt: skip
    return [*cases, gather]
