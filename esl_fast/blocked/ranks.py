"""Ranks both ways from units, tile by tile: the matrix is never held."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Images a tile; a tile's columns are the captions of as many images.
BLOCK_IMAGES = 512
BLOCK_CAPTIONS = 4096
# Diagonal tiles, which are needed twice, are kept up to this size in all.
KEPT_BYTES = 64 << 20


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


def by_owner(owners: Tensor, n: int) -> ByOwner:
    order = owners.argsort(stable=True)
    counts = torch.bincount(owners, minlength=n)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return ByOwner(order, owners[order], counts, starts, in_order)


def retrieval_ranks(image_units: Tensor, folded_text_units: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`esl_fast.reference.ranks.retrieval_ranks` of their product; an image without captions ranks M.

    Tile (r, c) holds the images of block r and the captions *owned by* block c, so that every positive lies in a
    diagonal tile. Those come first and give the scores to beat; since they are the same products that are
    counted later, a positive never loses to its own rounding.
    """
    n, m = image_units.shape[0], folded_text_units.shape[0]
    order, sorted_owners, counts, starts, in_order = by_owner(owners, n)
    texts = folded_text_units if in_order else folded_text_units[order]
    blocks = owner_blocks(counts.tolist())
    compute = torch.promote_types(image_units.dtype, torch.float32)

    def tile(row: tuple[int, int], column: tuple[int, int]) -> Tensor:
        captions = slice(starts[column[0]], starts[column[1]])
        return image_units[slice(*row)].to(compute) @ texts[captions].to(compute).mT

    positive = image_units.new_empty(m, dtype=compute)  # (M,) in sorted order
    best = image_units.new_full((n,), -torch.inf, dtype=compute)  # (N,)
    kept, budget = {}, KEPT_BYTES
    for block in blocks:
        scores = tile(block, block)
        first, last = starts[block[0]], starts[block[1]]
        rows = sorted_owners[first:last] - block[0]
        positive[first:last] = scores[rows, torch.arange(last - first, device=rows.device)]
        best[slice(*block)].scatter_reduce_(0, rows, positive[first:last], "amax")
        budget -= scores.nbytes
        if budget >= 0:
            kept[block] = scores

    image_ranks = torch.zeros(n, dtype=torch.int64, device=owners.device)
    text_ranks = torch.zeros(m, dtype=torch.int64, device=owners.device)
    for row in blocks:
        for column in blocks:
            scores = kept[row] if row == column and row in kept else tile(row, column)
            # Counted in floating point, exact below 2**24 and vectorised, which sums of booleans are not.
            reached = torch.empty_like(scores)
            captions = slice(starts[column[0]], starts[column[1]])
            torch.ge(scores, best[slice(*row), None], out=reached)
            image_ranks[slice(*row)] += reached.sum(1).long()
            torch.ge(scores, positive[captions], out=reached)
            text_ranks[captions] += reached.sum(0).long()
    image_ranks = torch.where(counts > 0, image_ranks - 1, m)
    return image_ranks, torch.empty_like(text_ranks).scatter_(0, order, text_ranks - 1)
