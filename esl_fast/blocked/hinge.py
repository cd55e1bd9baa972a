"""Hinge ranking loss of a matrix, some rows at a time: no temporary of its size but the gradient itself."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from esl_fast._autograd import apart, first_order

# Scores looked at at a time.
BLOCK_ELEMENTS = 1 << 20


class Hardest(NamedTuple):
    """The highest negative of each row and of each column; -inf where there is none."""

    caption_scores: Tensor  # (N,)
    captions: Tensor  # (N,) int64
    image_scores: Tensor  # (N,)
    images: Tensor  # (N,) int64

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Images and captions ``(3 N,)``: positives, each image's hardest caption, each caption's hardest image."""
        every = torch.arange(len(self.images), device=self.images.device)
        return torch.cat([every, every, self.images]), torch.cat([every, self.captions, every])


def _row_blocks(
    similarity: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows as a slice, a copy of their scores in at least float32, and which are no negatives."""
    n = len(similarity)
    compute = torch.promote_types(similarity.dtype, torch.float32)
    columns = torch.arange(n, device=similarity.device)
    block = max(1, BLOCK_ELEMENTS // max(n, 1))
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        excluded = columns[rows, None] == columns
        if image_ids is not None:
            excluded |= image_ids[rows, None] == text_ids
        yield rows, similarity[rows].to(compute, copy=True), excluded


def hardest_negatives(similarity: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Hardest:
    """The highest negative of each row and column of ``similarity (N, N)``.

    Of equal ones: the first of a column, and of a row what ``torch.max`` picks.
    """
    n, device = len(similarity), similarity.device
    compute = torch.promote_types(similarity.dtype, torch.float32)
    found = Hardest(
        torch.empty(n, dtype=compute, device=device), torch.empty(n, dtype=torch.int64, device=device),
        torch.full((n,), -torch.inf, dtype=compute, device=device), torch.zeros(n, dtype=torch.int64, device=device),
    )  # fmt: skip
    for rows, scores, excluded in _row_blocks(similarity, image_ids, text_ids):
        scores.masked_fill_(excluded, -torch.inf)
        found.caption_scores[rows], found.captions[rows] = scores.max(1)
        highest, where = scores.max(0)
        better = highest > found.image_scores
        found.image_scores.copy_(torch.where(better, highest, found.image_scores))
        found.images.copy_(torch.where(better, where + rows.start, found.images))
    return found


class AllNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, similarity, image_ids, text_ids, margin):
        compute = torch.promote_types(similarity.dtype, torch.float32)
        positive = similarity.diagonal().to(compute)
        loss = positive.new_zeros(())
        for rows, scores, excluded in _row_blocks(similarity, image_ids, text_ids):
            scores.add_(margin).masked_fill_(excluded, -torch.inf)
            # Not in place: torch.compile (2.11) loses the gradient of what was changed in place.
            loss = loss + (scores - positive[rows, None]).relu_().sum()
            loss = loss + scores.sub_(positive).relu_().sum()
        ctx.save_for_backward(similarity, image_ids, text_ids)
        ctx.margin = margin
        return loss

    @staticmethod
    @first_order
    def backward(ctx, grad):
        similarity, image_ids, text_ids = ctx.saved_tensors
        out = torch.empty_like(similarity)
        positive = similarity.diagonal().to(grad.dtype)
        pulls = torch.zeros_like(positive)
        for rows, scores, excluded in _row_blocks(similarity, image_ids, text_ids):
            scores.add_(ctx.margin).masked_fill_(excluded, -torch.inf)
            violated = torch.gt(scores, positive[rows, None], out=torch.empty_like(scores))
            pulls[rows] += violated.sum(1)
            torch.gt(scores, positive, out=scores)
            pulls += scores.sum(0)
            out[rows] = violated.add_(scores).mul_(grad)
        out.diagonal().copy_(-pulls * grad)
        return out, None, None, None


def hinge_loss(
    similarity: Tensor, image_ids: Tensor | None, text_ids: Tensor | None, margin: float, hardest: bool
) -> Tensor:
    """As :func:`esl_fast.reference.hinge.hinge_loss`, in at least float32."""
    if not hardest or not len(similarity):
        return AllNegatives.apply(*apart(similarity, image_ids, text_ids), margin)
    with torch.no_grad():
        found = hardest_negatives(similarity, image_ids, text_ids)
    # One look-up, so that backward makes one matrix.
    scores = similarity[found.pairs()]
    return hinge_of_hardest(scores.to(torch.promote_types(scores.dtype, torch.float32)), found, margin)


def hinge_of_hardest(scores: Tensor, found: Hardest, margin: float) -> Tensor:
    """The loss from the scores ``(3 N,)`` of ``found.pairs()``."""
    positive, captions, images = scores.split(len(found.captions))
    total = positive.new_zeros(())
    for negative, score in ((captions, found.caption_scores), (images, found.image_scores)):
        total = total + torch.where(score == -torch.inf, 0, (margin + negative - positive).relu()).sum()
    return total
