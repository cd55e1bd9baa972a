"""Region-word similarity in PyTorch, block by block: the products of words and regions never lie in memory as a whole.

Regions of a block of images are laid out region-major, `(R, n)`, and the real words of captions sorted by length one
after another. Products of captions of one length are then `(k, W, R, n)`: no padding is multiplied, and the
reductions over words and over regions both run over an outer axis with many contiguous columns inside. Backward forms
each block of products anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu_

from esl_fast._autocast import without_autocast
from esl_fast.reference.region_word import EPS, SLOPE

# Regions copied at a time, words multiplied with them at a time, products reduced at a time (these fit the cache).
BLOCK_REGIONS = 3500
BLOCK_WORDS = 768
BLOCK_REDUCED = 300_000
# Up to this inverse temperature no exponential of it overflows or vanishes: what it multiplies is in -1..1.
MILD = 60.0


class Segment(NamedTuple):
    """Captions of one length, whose words are consecutive rows of a block."""

    rows: slice
    captions: Tensor  # (k,) int64
    length: int


class WordBlock(NamedTuple):
    captions: Tensor  # (T,) int64: the caption of each row
    positions: Tensor  # (T,) int64: its place in the caption
    segments: list[Segment]


def word_blocks(lengths: Tensor, regions: int) -> list[WordBlock]:
    """Cut captions, sorted by length, into blocks of nearly equal size, of about BLOCK_WORDS real words.

    Each is in segments whose products with `regions` are BLOCK_REDUCED at most, or of one caption.
    """
    device, lengths = lengths.device, lengths.cpu()
    order = lengths.argsort(stable=True)
    lengths = lengths[order]
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    captions = order.repeat_interleave(lengths).to(device)
    positions = (torch.arange(total) - (ends - lengths).repeat_interleave(lengths)).to(device)
    size = total / max(1, round(total / BLOCK_WORDS))
    reduced = min(BLOCK_WORDS, BLOCK_REDUCED // max(regions, 1))
    distinct, counts = torch.unique_consecutive(lengths, return_counts=True)
    blocks, segments, start, stop = [], [], 0, 0
    for length, same in zip(distinct.tolist(), order.to(device).split(counts.tolist()), strict=True):
        for some in same.split(max(1, reduced // length)):
            segments.append(Segment(slice(stop - start, stop - start + len(some) * length), some, length))
            stop += len(some) * length
            if stop - start >= size or stop == total:
                blocks.append(WordBlock(captions[start:stop], positions[start:stop], segments))
                segments, start = [], stop
    return blocks


def _take(units: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `units[first, second]`, `(T, U)`, kept in the order (rows or units first) in which they lie in memory."""
    n, length, width = units.shape
    axis = 0 if units.stride(-1) == 1 else 1
    matrix = units if axis == 0 else units.movedim(-1, 0)
    if units.stride(0) == length * units.stride(1):  # one index is several times faster than two
        matrix = matrix.view((n * length, width) if axis == 0 else (width, n * length))
        rows = matrix.index_select(axis, first * length + second)
    else:
        rows = matrix[first, second] if axis == 0 else matrix[:, first, second]
    rows = rows.to(dtype)
    return rows if axis == 0 else rows.mT


class ImageBlock:
    """Some images' regions `units (R * n, U)`, region-major, with padding zeroed."""

    def __init__(self, region_units: Tensor, region_lengths: Tensor | None, images: slice, dtype: torch.dtype):
        device = region_units.device
        self.images, self.n, self.regions = images, images.stop - images.start, region_units.shape[1]
        first = torch.arange(images.start, images.stop, device=device).repeat(self.regions)
        second = torch.arange(self.regions, device=device).repeat_interleave(self.n)
        self.units = _take(region_units, first, second, dtype)
        self.padding, self.count = None, self.regions
        if region_lengths is not None:
            lengths = region_lengths[images]
            self.padding = torch.arange(self.regions, device=device)[:, None] >= lengths  # (R, n)
            self.count = lengths.to(dtype)  # (n,)
            self.units.masked_fill_(self.padding.view(-1, 1), 0)

    def rows(self, block: Tensor, rows: slice, length: int) -> Tensor:
        """Rows of `block (T, R * n)` as `(k, W, R, n)`."""
        return block[rows].view(-1, length, self.regions, self.n)


class Reduction:
    """Products `a (k, W, R, n)` to similarities `(k, n)`, in buffers that the next block overwrites."""

    def __init__(self, images: ImageBlock, smooth: float, rows: int):
        self.images, self.smooth = images, smooth
        self.b, self.free = (images.units.new_empty(rows * images.units.shape[0]) for _ in range(2))

    def __call__(self, a: Tensor) -> Tensor:
        b, free = self.b[: a.numel()].view(a.shape), self.free[: a.numel()].view(a.shape)
        leaky_relu_(torch.tanh(a, out=b), SLOPE)
        square = torch.mul(b, b, out=free)
        over_words, over_regions = square.sum(1, keepdim=True).sqrt_(), square.sum(2, keepdim=True).sqrt_()

        def attended(norm: Tensor, dim: int) -> Tensor:
            """The mean of a over `dim`, weighted by attention."""
            weights = torch.mul(b, norm.add_(EPS).reciprocal_().mul_(self.smooth), out=free)
            if dim == 2 and self.images.padding is not None:
                weights.masked_fill_(self.images.padding, -torch.inf)
            if not abs(self.smooth) <= MILD:
                weights.sub_(weights.amax(dim, keepdim=True))
            total = weights.exp_().sum(dim)
            return weights.mul_(a).sum(dim).div_(total)

        to_regions = attended(over_words, 2).sum(1).div_(a.shape[1])
        return to_regions.add_(attended(over_regions, 1).sum(1).div_(self.images.count))


class Attention:
    """Both attentions of products `a (k, W, R, n)`, in buffers that the next block overwrites."""

    def __init__(self, images: ImageBlock, rows: int):
        self.images = images
        self.buffers = images.units.new_empty(4, rows, images.units.shape[0])

    def __call__(self, a: Tensor, smooth: Tensor) -> None:
        words = slice(a.shape[0] * a.shape[1])
        self.a = a
        self.b, self.p, self.q, self.free = (self.images.rows(buffer, words, a.shape[1]) for buffer in self.buffers)
        leaky_relu_(torch.tanh(a, out=self.b), SLOPE)
        square = torch.mul(self.b, self.b, out=self.free)
        self.word_norm = square.sum(1, keepdim=True).sqrt_()  # (k, 1, R, n): over the words
        self.region_norm = square.sum(2, keepdim=True).sqrt_()  # (k, W, 1, n): over the regions
        torch.mul(self.b, smooth / (self.word_norm + EPS), out=self.p)
        torch.mul(self.b, smooth / (self.region_norm + EPS), out=self.q)
        if self.images.padding is not None:
            self.p.masked_fill_(self.images.padding, -torch.inf)
        torch.softmax(self.p, 2, out=self.p)
        torch.softmax(self.q, 1, out=self.q)

    def gradient(self, grad: Tensor, smooth: Tensor) -> Tensor:
        """Overwrite `a` by its gradient, given that of the similarity, `grad (k, n)`; returns that of smooth."""
        a, b, p, q, free = self.a, self.b, self.p, self.q, self.free
        if self.images.padding is not None:
            q.masked_fill_(self.images.padding, 0)
        grad_word, grad_region = grad[:, None, None] / a.shape[1], grad[:, None, None] / self.images.count
        through_mean = (p * grad_word).addcmul_(q, grad_region)
        # Through the softmaxes, to what they are taken of.
        p.mul_(torch.sub(a, torch.mul(p, a, out=free).sum(2, keepdim=True), out=free)).mul_(grad_word)
        q.mul_(torch.sub(a, torch.mul(q, a, out=free).sum(1, keepdim=True), out=free)).mul_(grad_region)
        grad_b, grad_smooth = torch.zeros_like(b), 0
        for part, norm, dim in ((p, self.word_norm, 1), (q, self.region_norm, 2)):
            scale = 1 / (norm + EPS)
            # Of a lone word or region nothing but the epsilon's term must be left, though scale is large: hence b over
            # its very norm.
            unit = torch.div(b, torch.where(norm > 0, norm, 1), out=free)  # b is 0 where its norm is
            dot = (part * unit).sum(dim, keepdim=True)
            grad_smooth = grad_smooth + (dot * norm * scale).sum()
            grad_b.addcmul_(part.addcmul_(unit, dot, value=-1), scale).addcmul_(unit, dot * (EPS * scale * scale))
        # Through leaky_relu and tanh; tanh is b where positive and b / SLOPE elsewhere.
        slope = torch.full_like(a, SLOPE).masked_fill_(a > 0, 1)
        tanh = b.div_(slope)
        torch.addcmul(through_mean, grad_b.mul_(slope).mul_(smooth), tanh.square_().neg_().add_(1), out=a)
        return grad_smooth


def _prepare(region_units: Tensor, word_units: Tensor, smooth: Tensor, word_lengths: Tensor):
    compute = torch.promote_types(torch.promote_types(region_units.dtype, word_units.dtype), torch.float32)
    slices = image_slices(*region_units.shape[:2])
    blocks = word_blocks(word_lengths, max((s.stop - s.start for s in slices), default=0) * region_units.shape[1])
    largest_product = max((len(block.captions) for block in blocks), default=0)
    largest_segment = max((s.rows.stop - s.rows.start for block in blocks for s in block.segments), default=0)
    return compute, smooth.to(compute), blocks, largest_product, largest_segment, slices


def image_slices(n: int, regions: int) -> list[slice]:
    """Blocks of nearly equal size, of about BLOCK_REGIONS regions; where there are many, columns fill whole vectors."""
    count = min(n, max(1, round(n * regions / BLOCK_REGIONS)))
    size = -(-n // max(1, count))
    size = -(-size // 16) * 16 if count > 2 and size > 16 else size
    return [slice(start, min(start + size, n)) for start in range(0, n, max(size, 1))]


@torch.library.custom_op("esl_fast::region_word_blocked", mutates_args=())
def _forward(
    region_units: Tensor, word_units: Tensor, smooth: Tensor, word_lengths: Tensor, region_lengths: Tensor | None
) -> Tensor:
    compute, smooth, blocks, product_rows, reduced_rows, slices = _prepare(
        region_units, word_units, smooth, word_lengths
    )
    out = region_units.new_empty(region_units.shape[0], word_units.shape[0], dtype=compute)

    def score(images: ImageBlock) -> None:
        """Fill the rows of some images; in a function, so that nothing of them is kept while the next are copied."""
        products = images.units.new_empty(product_rows, images.units.shape[0])
        reduction = Reduction(images, float(smooth), reduced_rows)
        for block in blocks:
            a = products[: len(block.captions)]
            torch.mm(_take(word_units, block.captions, block.positions, compute), images.units.mT, out=a)
            for rows, captions, length in block.segments:
                out[images.images, captions] = reduction(images.rows(a, rows, length)).mT

    for images_slice in slices:
        score(ImageBlock(region_units, region_lengths, images_slice, compute))
    return out


@_forward.register_fake
def _(region_units, word_units, smooth, word_lengths, region_lengths):
    compute = torch.promote_types(torch.promote_types(region_units.dtype, word_units.dtype), torch.float32)
    return region_units.new_empty(region_units.shape[0], word_units.shape[0], dtype=compute)


@torch.library.custom_op("esl_fast::region_word_blocked_backward", mutates_args=())
def _backward(
    grad: Tensor,
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor,
    word_lengths: Tensor,
    region_lengths: Tensor | None,
    for_regions: bool,
    for_words: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to regions, words (empty where not wanted) and smooth."""
    smooth_dtype = smooth.dtype
    compute, smooth, blocks, product_rows, reduced_rows, slices = _prepare(
        region_units, word_units, smooth, word_lengths
    )
    (n, regions, width), (m, length, _) = region_units.shape, word_units.shape
    grad_regions = region_units.new_zeros((n, regions, width) if for_regions else 0)
    grad_words = word_units.new_zeros((m * length, width) if for_words else 0, dtype=compute)
    grad_smooth = smooth.new_zeros(())
    for images_slice in slices:
        images = ImageBlock(region_units, region_lengths, images_slice, compute)
        products = images.units.new_empty(product_rows, images.units.shape[0])
        attention = Attention(images, reduced_rows)
        block_regions = images.units.new_zeros(images.units.shape) if for_regions else None
        for block in blocks:
            words = _take(word_units, block.captions, block.positions, compute)
            a = torch.mm(words, images.units.mT, out=products[: len(words)])
            for rows, captions, segment_length in block.segments:
                attention(images.rows(a, rows, segment_length), smooth)
                block_grad = grad[images.images, captions].to(compute).mT.contiguous()
                grad_smooth += attention.gradient(block_grad, smooth)
            if for_regions:
                block_regions.addmm_(a.mT, words)
            if for_words:
                grad_words.index_add_(0, block.captions * length + block.positions, a @ images.units)
        if for_regions:
            grad_regions[images.images] = block_regions.view(regions, -1, width).transpose(0, 1)
    if for_words:
        grad_words = grad_words.view(m, length, width)
    return grad_regions, grad_words.to(word_units.dtype), grad_smooth.to(smooth_dtype)


@_backward.register_fake
def _(grad, region_units, word_units, smooth, word_lengths, region_lengths, for_regions, for_words):
    grad_regions = region_units.new_empty(region_units.shape if for_regions else 0)
    grad_words = word_units.new_empty(word_units.shape if for_words else 0)
    return grad_regions, grad_words, smooth.new_empty(())


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


@without_autocast
def _differentiate(ctx, grad):
    wanted = ctx.needs_input_grad[:3]
    grads = _backward(grad, *ctx.saved_tensors, *wanted[:2])
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def region_word_similarity(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """As :func:`esl_fast.reference.region_word.region_word_similarity`, in at least float32; `smooth` is 0-d.

    Beyond inputs, output and gradients it needs about 45 MB (36 regions, 1,022 units) however many images and
    captions there are.
    """
    return _forward(region_units, word_units, smooth, word_lengths, region_lengths)
