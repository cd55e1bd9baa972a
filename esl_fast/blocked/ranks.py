"""Ranks both ways from units, tile by tile: the matrix is never held."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Images a tile; a tile's columns are the captions of as many images.
BLOCK_IMAGES = 512
BLOCK_CAPTIONS = 4096


def owner_blocks(counts: list[int]) -> list[tuple[int, int]]:
    """Ranges of images with at most BLOCK_IMAGES images and, but for a single image, BLOCK_CAPTIONS captions."""
    blocks, start, captions = [], 0, 0
    # Blocks of one size: a product of another shape may round the same scores differently.
    images = math.ceil(len(counts) / max(1, math.ceil(len(counts) / BLOCK_IMAGES)))
    for image, count in enumerate(counts):
        if image > start and (image - start == images or captions + count > BLOCK_CAPTIONS):
            blocks.append((start, image))
            start, captions = image, 0
        captions += count
    if counts:
        blocks.append((start, len(counts)))
    return blocks


class ByOwner(NamedTuple):
    """Captions in the order of their images."""

    order: Tensor  # (M,) int64
    owners: Tensor  # (M,) of the captions in that order
    counts: Tensor  # (N,) captions an image
    starts: list[int]  # where each image's captions begin, and M
    sorted: bool  # whether they lie in that order already

    def blocks(self) -> list[tuple[slice, slice]]:
        """Ranges of images, as :func:`owner_blocks` cuts them, and of the captions they own."""
        blocks = owner_blocks(self.counts.tolist())
        return [(slice(first, last), slice(self.starts[first], self.starts[last])) for first, last in blocks]

    def as_given(self, x: Tensor) -> Tensor:
        """Values ``(M,)`` of the captions in that order, in the order in which they were given."""
        return torch.empty_like(x).scatter_(0, self.order, x)


def by_owner(owners: Tensor, n: int) -> ByOwner:
    order = owners.argsort(stable=True)
    counts = torch.bincount(owners, minlength=n)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return ByOwner(order, owners[order], counts, starts, in_order)


class RankCounter:
    """Ranks both ways of N images and M captions from tiles of their scores.

    A rank is the number of other items that do not score below the right one: NaN and ties count against the model. A
    right answer whose score is not finite ranks last.
    """

    def __init__(self, n: int, m: int, dtype: torch.dtype, device: torch.device) -> None:
        self.positive = torch.full((m,), -torch.inf, dtype=dtype, device=device)
        self.best = torch.full((n,), -torch.inf, dtype=dtype, device=device)
        # Right answers do not score below themselves.
        self.image_ranks = torch.full((n,), m - 1, dtype=torch.int64, device=device)
        self.text_ranks = torch.full((m,), n - 1, dtype=torch.int64, device=device)

    def set_bars(self, images: slice, captions: slice, scores: Tensor, rows: Tensor) -> None:
        """Take what is to be reached from a tile; ``rows`` are its captions' images, which have no others."""
        own = scores[rows, torch.arange(len(rows), device=rows.device)].to(self.positive.dtype)
        self.positive[captions] = torch.where(own.isfinite(), own, -torch.inf)
        self.best[images] = self.best[images].scatter_reduce(0, rows, self.positive[captions], "amax")

    def count(self, images: slice, captions: slice, scores: Tensor) -> None:
        # Counted in floating point, exact below 2**24 and vectorised, which sums of booleans are not.
        below = torch.empty_like(scores)
        torch.lt(scores, self.best[images, None], out=below)
        self.image_ranks[images] -= below.sum(1).long()
        torch.lt(scores, self.positive[captions], out=below)
        self.text_ranks[captions] -= below.sum(0).long()

    def ranks(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Image-to-text ``(N,)`` and text-to-image ``(M,)``; an image without captions (``counts (N,)``) ranks M."""
        return torch.where(counts > 0, self.image_ranks, len(self.text_ranks)), self.text_ranks


def count_ranks(
    tile: Callable[[slice, slice], Tensor], owned: ByOwner, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Ranks both ways from ``tile(images, captions)``: scores of some images and of some captions, these ``owned``.

    Each tile is asked for once, and a positive counted as it was read: a score to beat is never compared with another
    rounding of itself.
    """
    counter = RankCounter(len(owned.counts), len(owned.order), dtype, owned.order.device)
    blocks = owned.blocks()
    owning = [(images, captions) for images, captions in blocks if captions.start < captions.stop]
    for images, captions in owning:  # every positive lies in one of these diagonal tiles
        scores = tile(images, captions)
        counter.set_bars(images, captions, scores, owned.owners[captions] - images.start)
        counter.count(images, captions, scores)
    for images, own in blocks:
        for _, captions in owning:
            if captions != own:
                counter.count(images, captions, tile(images, captions))
    image_ranks, text_ranks = counter.ranks(owned.counts)
    return image_ranks, owned.as_given(text_ranks)


def retrieval_ranks(image_units: Tensor, folded_text_units: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`esl_fast.reference.ranks.retrieval_ranks` of their product; an image without captions ranks M."""
    owned = by_owner(owners, image_units.shape[0])
    texts = folded_text_units if owned.sorted else folded_text_units[owned.order]
    compute = torch.promote_types(torch.promote_types(image_units.dtype, texts.dtype), torch.float32)

    def tile(images: slice, captions: slice) -> Tensor:
        return image_units[images].to(compute) @ texts[captions].to(compute).mT

    return count_ranks(tile, owned, compute)
