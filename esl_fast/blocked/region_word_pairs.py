"""Region-word scores of chosen pairs: the units of some pairs are gathered at a time, padded to one size."""

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from esl_fast.reference.region_word import EPS, SLOPE

# Blocks of products that exist at once.
ATTENDED = 8
# Units and products held at a time.
GATHERED_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


def attend(a: Tensor, smooth: Tensor, real_words: Tensor, real_regions: Tensor | None) -> Tensor:
    """Reduce blocks ``a (..., W, R)``, 0 where padded, to ``(...)``; masks are ``(..., W)`` and ``(..., R)``."""
    b = leaky_relu(torch.tanh(a), SLOPE)
    to_regions = smooth * b / (torch.linalg.vector_norm(b, dim=-2, keepdim=True) + EPS)
    to_words = smooth * b / (torch.linalg.vector_norm(b, dim=-1, keepdim=True) + EPS)
    regions: Tensor | int = a.shape[-1]
    if real_regions is not None:
        to_regions = to_regions.masked_fill(~real_regions[..., None, :], -torch.inf)
        regions = real_regions.sum(-1)
    to_words = to_words.masked_fill(~real_words[..., :, None], -torch.inf)
    by_words = (a * to_regions.softmax(-1)).sum((-2, -1)) / real_words.sum(-1)
    return by_words + (a * to_words.softmax(-2)).sum((-2, -1)) / regions


def _gather(
    units: Tensor, lengths: Tensor | None, index: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``units[index]``, ``(B, K, L, U)``, and which of it is no padding, ``(B, K, L)``, on ``device``."""
    taken = units[index.to(units.device)].to(device, dtype)
    if lengths is None:
        return taken, None
    lengths = lengths[index.to(lengths.device)].to(device, non_blocking=True)
    real = torch.arange(units.shape[1], device=device) < lengths[..., None]
    if torch.is_grad_enabled():  # their products are masked, but gradients of 0 times NaN would not be 0
        taken.masked_fill_(~real[..., None], 0)
    return taken, real


def _scores(
    region_units: Tensor, word_units: Tensor, smooth: Tensor, word_lengths: Tensor, region_lengths: Tensor | None,
    images: Tensor, captions: Tensor,
) -> Tensor:  # fmt: skip
    """Scores ``(B, K)`` of ``images (B, K or 1)`` and ``captions (B, 1 or K)``."""
    device = smooth.device
    compute = torch.promote_types(region_units.dtype, torch.float32)
    product = compute if device.type == "cpu" else region_units.dtype
    regions, real_regions = _gather(region_units, region_lengths, images, device, product)
    words, real_words = _gather(word_units, word_lengths, captions, device, product)
    a = words.flatten(1, 2) @ regions.flatten(1, 2).mT  # (B, captions * W, images * R): one of the two counts is 1
    a = a.unflatten(2, regions.shape[1:3]).unflatten(1, words.shape[1:3]).transpose(2, 3).flatten(1, 2)
    real = real_words[..., :, None]
    if real_regions is not None:
        real = real & real_regions[..., None, :]
    return attend(a.to(compute).masked_fill(~real, 0), smooth.to(compute), real_words, real_regions)


def candidate_scores(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor,
    word_lengths: Tensor,
    region_lengths: Tensor | None,
    queries: Tensor,
    candidates: Tensor,
    query: str,
) -> Tensor:
    """Scores ``(Q, k)`` of ``queries (Q,)`` with their ``candidates (Q, k)``; ``query`` is the side the former are of.

    Computed where ``smooth`` lies; units may lie elsewhere. Differentiable, the blocks being computed again backward.
    """
    (q, k), (_, regions, width), words = candidates.shape, region_units.shape, word_units.shape[1]
    compute = torch.promote_types(region_units.dtype, torch.float32)
    if q == 0 or k == 0:
        return torch.empty(q, k, dtype=compute, device=smooth.device)
    asking, asked = (regions, words) if query == "image" else (words, regions)
    query_bytes = asking * width * compute.itemsize
    candidate_bytes = (asked * width + ATTENDED * regions * words) * compute.itemsize
    budget = GATHERED_BYTES["cpu" if smooth.device.type == "cpu" else "cuda"]
    some = min(k, max(1, (budget - query_bytes) // max(candidate_bytes, 1)))
    rows = max(1, budget // max(query_bytes + some * candidate_bytes, 1))
    on_host = word_lengths.device.type == queries.device.type == "cpu"
    # Captions of one length need no padding.
    order = word_lengths[queries].argsort() if on_host and query == "text" else None
    if order is not None:
        queries, candidates = queries[order], candidates[order]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (region_units, word_units, smooth))
    out = []
    for start in range(0, q, rows):
        parts = []
        for first in range(0, k, some):
            mine = queries[start : start + rows, None]
            theirs = candidates[start : start + rows, first : first + some]
            images, captions = (mine, theirs) if query == "image" else (theirs, mine)
            longest = int(word_lengths[captions].max()) if on_host else words
            inputs = (
                region_units, word_units[:, :longest], smooth, word_lengths, region_lengths, images, captions
            )  # fmt: skip
            if grad and (q > rows or k > some):
                parts.append(checkpoint(_scores, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_scores(*inputs))
        out.append(torch.cat(parts, 1))
    scores = torch.cat(out)
    return scores if order is None else torch.empty_like(scores).index_copy(0, order, scores)
