"""Region-word similarity in PyTorch, block by block: the products of words and regions never lie in memory as a whole.

Regions stay as they lie, and the real words of captions sorted by length are laid one after another. Products of
captions of one length are then `(k, W, n, R)`: no padding of words is multiplied, the reduction over words runs over an
outer axis with many contiguous columns inside, and that over regions is a product with ones. Backward forms each block
of products anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu_

from esl_fast._autocast import without_autocast
from esl_fast._autograd import first_order
from esl_fast.reference.region_word import EPS, SLOPE

# Regions and words multiplied at a time, products reduced at a time (these fit the cache).
BLOCK_REGIONS = 3500
BLOCK_WORDS = 1536
BLOCK_REDUCED = 300_000
# Up to this inverse temperature no exponential of it overflows or vanishes: what it multiplies is in -1..1.
MILD = 60.0


class Segment(NamedTuple):
    """So many captions of one length, whose words are consecutive rows of a block."""

    captions: int
    length: int

    @property
    def rows(self) -> int:
        return self.captions * self.length


class WordBlock(NamedTuple):
    captions: Tensor  # (K,) int64
    lengths: Tensor  # (K,) int64
    owners: Tensor  # (T,) int64: the caption of each row
    positions: Tensor  # (T,) int64: its place in the caption
    segments: list[Segment]


def word_blocks(lengths: Tensor, regions: int) -> list[WordBlock]:
    """Cut captions, sorted by length, into blocks of nearly equal size, of about BLOCK_WORDS real words.

    Each is in segments whose products with `regions` are about BLOCK_REDUCED, or of one caption.
    """
    device, lengths = lengths.device, lengths.cpu().long()
    order = lengths.argsort(stable=True)
    lengths = lengths[order]
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    owners = order.repeat_interleave(lengths).to(device)
    positions = (torch.arange(total) - (ends - lengths).repeat_interleave(lengths)).to(device)
    size = total / max(1, round(total / BLOCK_WORDS))
    reduced = max(1, min(BLOCK_WORDS, BLOCK_REDUCED // max(regions, 1)))
    distinct, counts = torch.unique_consecutive(lengths, return_counts=True)
    order, lengths = order.to(device), lengths.to(device)
    blocks, segments, start, stop, first, last = [], [], 0, 0, 0, 0
    for length, same in zip(distinct.tolist(), counts.tolist(), strict=True):
        for some in even_parts(same, round(same * length / reduced)):
            segments.append(Segment(some, length))
            stop, last = stop + some * length, last + some
            if stop - start >= size or stop == total:
                captions, rows = slice(first, last), slice(start, stop)
                blocks.append(WordBlock(order[captions], lengths[captions], owners[rows], positions[rows], segments))
                segments, start, first = [], stop, last
    return blocks


def even_parts(total: int, parts: int) -> list[int]:
    """Sizes of about so many parts, at least one and none of them empty."""
    parts = min(max(parts, 1), total)
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


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
    """Some images' regions `units (n * R, U)`, with padding zeroed."""

    def __init__(self, region_units: Tensor, region_lengths: Tensor | None, images: slice, dtype: torch.dtype):
        self.images, self.n, self.regions = images, images.stop - images.start, region_units.shape[1]
        units = region_units[images]
        self.padding, self.count = None, self.regions
        if region_lengths is not None:
            lengths = region_lengths[images]
            self.padding = torch.arange(self.regions, device=lengths.device) >= lengths[:, None]  # (n, R)
            self.count = lengths.to(dtype)  # (n,)
            units = units.masked_fill(self.padding[..., None], 0)
        self.units = units.to(dtype).flatten(0, 1)
        self.ones = self.units.new_ones(self.regions)

    def segments(self, products: Tensor, segments: list[Segment]) -> list[Tensor]:
        """Cut `products (T, n * R)` into those of segments, `(k, W, n, R)`."""
        parts = zip(products.split([segment.rows for segment in segments]), segments, strict=True)
        return [part.view(*segment, self.n, self.regions) for part, segment in parts]

    def sum_regions(self, x: Tensor) -> Tensor:
        """Sums `(...)` of contiguous `x (..., R)`; over so few neighbours a product with ones is faster than `sum`."""
        return torch.mv(x.view(-1, self.regions), self.ones).view(x.shape[:-1])


class Operands(NamedTuple):
    """A segment's products, the buffers it overwrites and what it fills, `(k, W, n, R)` where no shape is given."""

    a: Tensor
    b: Tensor
    free: Tensor
    free_rows: Tensor  # (k * W * n, R)
    scales: Tensor  # flat: the next two
    over_words: Tensor  # (k, 1, n, R)
    over_regions: Tensor  # (k, W, n, 1)
    word_sums: Tensor  # (k * W * n,): that again, overwritten by words' attended products
    per_caption: Tensor  # (k, W, n)
    words: Tensor  # (k, n): the sum of words' attended products
    totals: Tensor  # (k, n, R): regions' weights
    sums: Tensor  # (k, n, R): and weighted products


class Reduction:
    """Products of words and regions to similarities, in buffers that the next segment overwrites.

    Views are made for all segments of a block at once: between operations on products each finds the caches cold.
    """

    def __init__(self, images: ImageBlock, smooth: Tensor, blocks: list[WordBlock]):
        self.images, self.smooth, self.eps = images, smooth, smooth.new_tensor(EPS)
        self.mild = abs(float(smooth)) <= MILD
        segments = [segment for block in blocks for segment in block.segments]
        size = _segment_rows(blocks) * len(images.units)
        scales = max((s.rows + s.captions * images.regions for s in segments), default=0) * images.n
        self.b, self.free, self.scales = (images.units.new_empty(x) for x in (size, size, scales))

    def __call__(self, products: Tensor, block: WordBlock) -> Tensor:
        """Similarities `(K, n)` of a block's `products (T, n * R)`."""
        images, captions = self.images, len(block.captions)
        words = products.new_empty(captions, images.n)
        totals, sums = products.new_empty(2, captions, images.n, images.regions).unbind()
        counts = [segment.captions for segment in block.segments]
        results = zip(words.split(counts), totals.split(counts), sums.split(counts), strict=True)
        parts = zip(images.segments(products, block.segments), results, strict=True)
        for operands in [self._operands(a, *result) for a, result in parts]:
            self._attend(operands)
        regions = images.sum_regions(sums.div_(totals)).div_(images.count)
        return regions.add_(words.div_(block.lengths[:, None]))

    def _operands(self, a: Tensor, words: Tensor, totals: Tensor, sums: Tensor) -> Operands:
        captions, length, n, regions = a.shape
        b, free = self.b[: a.numel()].view(a.shape), self.free[: a.numel()].view(a.shape)
        sizes = captions * n * regions, captions * length * n
        scales = self.scales[: sum(sizes)]
        over_words, per_word = scales.split(sizes)
        return Operands(
            a=a, b=b, free=free, free_rows=free.view(-1, regions), scales=scales,
            over_words=over_words.view(captions, 1, n, regions), over_regions=per_word.view(captions, length, n, 1),
            word_sums=per_word, per_caption=per_word.view(captions, length, n), words=words, totals=totals, sums=sums,
        )  # fmt: skip

    def _attend(self, o: Operands) -> None:
        ones, padding = self.images.ones, self.images.padding
        a, b, free, free_rows, word_sums = o.a, o.b, o.free, o.free_rows, o.word_sums
        leaky_relu_(torch.tanh(a, out=b), SLOPE)
        torch.mul(b, b, out=free)
        torch.sum(free, 1, keepdim=True, out=o.over_words)
        torch.mv(free_rows, ones, out=word_sums)
        torch.div(self.smooth, o.scales.sqrt_().add_(self.eps), out=o.scales)  # smooth over the norms

        torch.mul(b, o.over_words, out=free)
        b.mul_(o.over_regions)  # now: word_sums will overwrite it
        if padding is not None:
            free.masked_fill_(padding, -torch.inf)
        self._exp(free, 3)
        word_totals = torch.mv(free_rows, ones)
        free.mul_(a)
        torch.mv(free_rows, ones, out=word_sums).div_(word_totals)
        torch.sum(o.per_caption, 1, out=o.words)

        self._exp(b, 1)
        torch.sum(b, 1, out=o.totals)
        torch.sum(b.mul_(a), 1, out=o.sums)

    def _exp(self, logits: Tensor, dim: int) -> None:
        """Exponentials in place, up to a factor along `dim`."""
        if not self.mild:
            logits.sub_(logits.amax(dim, keepdim=True))
        logits.exp_()


class Attention:
    """Both attentions of products `a (k, W, n, R)`, in buffers that the next block overwrites."""

    def __init__(self, images: ImageBlock, rows: int):
        self.images = images
        self.buffers = images.units.new_empty(4, rows * len(images.units))

    def __call__(self, a: Tensor, smooth: Tensor) -> None:
        self.a = a
        self.b, self.p, self.q, self.free = self.buffers[:, : a.numel()].view(4, *a.shape).unbind()
        leaky_relu_(torch.tanh(a, out=self.b), SLOPE)
        square = torch.mul(self.b, self.b, out=self.free)
        self.word_norm = square.sum(1, keepdim=True).sqrt_()  # (k, 1, n, R): over the words
        self.region_norm = self._sum(square, 3).sqrt_()  # (k, W, n, 1): over the regions
        torch.mul(self.b, smooth / (self.word_norm + EPS), out=self.p)
        torch.mul(self.b, smooth / (self.region_norm + EPS), out=self.q)
        if self.images.padding is not None:
            self.p.masked_fill_(self.images.padding, -torch.inf)
        torch.softmax(self.p, 3, out=self.p)
        torch.softmax(self.q, 1, out=self.q)

    def _sum(self, x: Tensor, dim: int) -> Tensor:
        return self.images.sum_regions(x)[..., None] if dim == 3 else x.sum(dim, keepdim=True)

    def gradient(self, grad: Tensor, smooth: Tensor) -> Tensor:
        """Overwrite `a` by its gradient, given that of the similarity, `grad (k, n)`; returns that of smooth."""
        a, b, p, q, free = self.a, self.b, self.p, self.q, self.free
        if self.images.padding is not None:
            q.masked_fill_(self.images.padding, 0)
        grad_word, grad_region = (g[:, None, :, None] for g in (grad / a.shape[1], grad / self.images.count))
        through_mean = (p * grad_word).addcmul_(q, grad_region)
        # Through the softmaxes, to what they are taken of.
        p.mul_(torch.sub(a, self._sum(torch.mul(p, a, out=free), 3), out=free)).mul_(grad_word)
        q.mul_(torch.sub(a, self._sum(torch.mul(q, a, out=free), 1), out=free)).mul_(grad_region)
        grad_b, grad_smooth = torch.zeros_like(b), 0
        for part, norm, dim in ((p, self.word_norm, 1), (q, self.region_norm, 3)):
            scale = 1 / (norm + EPS)
            # Of a lone word or region nothing but the epsilon's term must be left, though scale is large: hence b over
            # its very norm.
            unit = torch.div(b, torch.where(norm > 0, norm, 1), out=free)  # b is 0 where its norm is
            dot = self._sum(part * unit, dim)
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
    product_rows = max((len(block.owners) for block in blocks), default=0)
    return compute, smooth.to(compute), blocks, product_rows, slices


def _segment_rows(blocks: list[WordBlock]) -> int:
    """Rows of the largest segment."""
    return max((s.rows for block in blocks for s in block.segments), default=0)


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
    compute, smooth, blocks, product_rows, slices = _prepare(region_units, word_units, smooth, word_lengths)
    out = region_units.new_empty(region_units.shape[0], word_units.shape[0], dtype=compute)

    def score(images: ImageBlock) -> None:
        """Fill the rows of some images; in a function, so that nothing of them is kept while the next are made."""
        products = images.units.new_empty(product_rows, len(images.units))
        reduction = Reduction(images, smooth, blocks)
        for block in blocks:
            a = products[: len(block.owners)]
            torch.mm(_take(word_units, block.owners, block.positions, compute), images.units.mT, out=a)
            out[images.images, block.captions] = reduction(a, block).mT

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
    compute, smooth, blocks, product_rows, slices = _prepare(region_units, word_units, smooth, word_lengths)
    (n, regions, width), (m, length, _) = region_units.shape, word_units.shape
    grad_regions = region_units.new_zeros((n, regions, width) if for_regions else 0)
    grad_words = word_units.new_zeros((m * length, width) if for_words else 0, dtype=compute)
    grad_smooth = smooth.new_zeros(())
    for images_slice in slices:
        images = ImageBlock(region_units, region_lengths, images_slice, compute)
        products = images.units.new_empty(product_rows, len(images.units))
        attention = Attention(images, _segment_rows(blocks))
        block_regions = images.units.new_zeros(images.units.shape) if for_regions else None
        for block in blocks:
            words = _take(word_units, block.owners, block.positions, compute)
            a = torch.mm(words, images.units.mT, out=products[: len(words)])
            captions = block.captions.split([segment.captions for segment in block.segments])
            for part, some in zip(images.segments(a, block.segments), captions, strict=True):
                attention(part, smooth)
                grad_smooth += attention.gradient(grad[images.images, some].to(compute).mT.contiguous(), smooth)
            if for_regions:
                block_regions.addmm_(a.mT, words)
            if for_words:
                grad_words.index_add_(0, block.owners * length + block.positions, a @ images.units)
        if for_regions:
            grad_regions[images.images] = block_regions.view(-1, regions, width)
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


@first_order
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

    Beyond inputs, output and gradients it needs some 45 to 65 MB (36 regions, 1,022 units) however many images and
    captions there are.
    """
    return _forward(region_units, word_units, smooth, word_lengths, region_lengths)
