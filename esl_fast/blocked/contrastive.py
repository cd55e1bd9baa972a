"""Symmetric InfoNCE from units, a block of rows at a time: memory O(N + M) beside the gradients.

Forward streams the logits once, with row sums complete in each block and column sums carried along as a running
maximum and sum. Backward computes each block again: four matrix products in all.
"""

import torch
from torch import Tensor

from esl_fast._autocast import without_autocast
from esl_fast._autograd import apart, first_order

# Logits held at a time; small enough for the cache, large enough for a fast product.
BLOCK_ELEMENTS = 1 << 21


class ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, logit_scale, image_ids, text_ids, same_owner):
        (n, m), scale = (images.shape[0], texts.shape[0]), logit_scale.detach()
        row_lse = images.new_empty(n)
        column_max, column_sum = images.new_full((m,), -torch.inf), images.new_zeros(m)
        row_positive, column_positive = images.new_zeros(n), images.new_zeros(m)
        row_count, column_count = images.new_zeros(n), images.new_zeros(m)
        buffer = None
        for rows, logits, same in _logit_blocks(images, texts, scale, image_ids, text_ids, same_owner):
            if same is None:
                diagonal = torch.arange(rows.start, rows.stop, device=images.device)
                row_positive[rows] = column_positive[rows] = logits[diagonal - rows.start, diagonal]
                row_count[rows] = column_count[rows] = 1
            else:
                row_count[rows] = same.sum(1)
                column_count += same.sum(0)
                positive = logits * same
                row_positive[rows] = positive.sum(1)
                column_positive += positive.sum(0)
            buffer = torch.empty_like(logits) if buffer is None else buffer[: len(logits)]
            row_max = logits.amax(1, keepdim=True)
            row_lse[rows] = torch.sub(logits, row_max, out=buffer).exp_().sum(1).log_().add_(row_max[:, 0])
            new_max = torch.maximum(column_max, logits.amax(0))
            # Of a text whose scores are left out so far, exp(-inf) is 0, not NaN.
            shift = torch.where(new_max == -torch.inf, 0, new_max)
            column_sum.mul_(torch.exp(column_max - shift)).add_(torch.sub(logits, shift, out=buffer).exp_().sum(0))
            column_max = new_max
        column_lse = column_sum.log_().add_(column_max)
        loss = images.new_zeros(())
        weights = []  # of each query's cross-entropy in the loss
        for lse, positive, count in ((row_lse, row_positive, row_count), (column_lse, column_positive, column_count)):
            counted = count > 0
            weight = counted.to(images.dtype) / (2 * counted.sum().clamp(min=1))
            # Not in place: torch.compile (2.11) loses the gradient of what was changed in place.
            loss = loss + (weight * torch.where(counted, lse - positive / count.clamp(min=1), 0)).sum()
            weights.append(weight)
        ctx.save_for_backward(
            images, texts, logit_scale, image_ids, text_ids, row_lse, column_lse, *weights, row_count, column_count
        )
        ctx.same_owner = same_owner
        return loss

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, grad):
        images, texts, logit_scale, image_ids, text_ids, row_lse, column_lse, *rest = ctx.saved_tensors
        row_weight, column_weight, row_count, column_count = rest
        scale = logit_scale.detach()
        # exp(logit - lse) * weight in one exponential each.
        row_shift, column_shift = row_lse - row_weight.log(), column_lse - column_weight.log()
        row_target, column_target = row_weight / row_count.clamp(min=1), column_weight / column_count.clamp(min=1)
        d_images, d_texts, d_scale = torch.empty_like(images), torch.zeros_like(texts), images.new_zeros(())
        buffer = None
        for rows, logits, same in _logit_blocks(images, texts, scale, image_ids, text_ids, ctx.same_owner):
            buffer = torch.empty_like(logits) if buffer is None else buffer[: len(logits)]
            torch.sub(logits, row_shift[rows, None], out=buffer).exp_()
            d_logits = logits.sub_(column_shift).exp_().add_(buffer)
            if same is None:
                diagonal = torch.arange(rows.start, rows.stop, device=images.device)
                d_logits[diagonal - rows.start, diagonal] -= row_target[rows] + column_target[rows]
            else:
                d_logits -= same * (row_target[rows, None] + column_target)
            torch.mm(d_logits, texts, out=d_images[rows])
            d_texts.addmm_(d_logits.mT, images[rows])
            d_scale += torch.linalg.vecdot(d_images[rows], images[rows]).sum()
        factor = scale.reshape(()) * grad
        d_scale = (d_scale * grad).reshape(logit_scale.shape)
        return d_images.mul_(factor), d_texts.mul_(factor), d_scale, None, None, None


def _logit_blocks(images, texts, scale, image_ids, text_ids, same_owner):
    """Yield rows as a slice, their logits (overwritten by the next), and their positives (None: the diagonal)."""
    n, m = images.shape[0], texts.shape[0]
    block = min(n, max(16, BLOCK_ELEMENTS // max(m, 1)))
    scratch = images.new_empty(block, m)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        logits = torch.mm(images[rows] * scale.reshape(()), texts.mT, out=scratch[: rows.stop - start])
        same = None
        if image_ids is not None and same_owner != "negative":
            same = image_ids[rows, None] == text_ids
            if same_owner == "ignore":
                diagonal = torch.arange(rows.start, rows.stop, device=images.device)
                same[diagonal - start, diagonal] = False
                logits.masked_fill_(same, -torch.inf)
                same = None
        yield rows, logits, same


def contrastive_loss(
    image_units: Tensor,
    folded_text_units: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_owner: str,
) -> Tensor:
    """As :func:`esl_fast.reference.contrastive.contrastive_loss` of their product, for float32 or float64 units."""
    tensors = apart(image_units, folded_text_units, logit_scale, image_ids, text_ids)
    return ContrastiveLoss.apply(*tensors, same_owner)
