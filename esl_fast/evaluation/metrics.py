"""Recall figures of the field from ranks, and ranks from a similarity matrix."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esl_fast.blocked.ranks import RankCounter
from esl_fast.ops import checks

CUTOFFS = (1, 5, 10)
# Similarities compared at a time when ranking a matrix.
BLOCK_ELEMENTS = 1 << 24


def recall_metrics(image_ranks: Tensor, text_ranks: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, median and mean rank counted from 1, each way, and rsum, the six recalls added.

    ``image_ranks (N,)`` are image-to-text and ``text_ranks (M,)`` text-to-image ranks counted from 0.
    """
    metrics: dict[str, float] = {}
    for way, ranks in (("i2t", image_ranks), ("t2i", text_ranks)):
        ranks = ranks.cpu().numpy()
        if not len(ranks):
            raise ValueError("nothing to rank: there are no queries")
        for k in CUTOFFS:
            metrics[f"{way}_r{k}"] = float(100 * (ranks < k).mean())
        metrics[f"{way}_median_rank"] = float(np.median(ranks) + 1)
        metrics[f"{way}_mean_rank"] = float(ranks.mean() + 1)
    metrics["rsum"] = sum(metrics[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in CUTOFFS)
    return metrics


def mean_metrics(folds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics averaged over folds."""
    return {name: float(np.mean([fold[name] for fold in folds])) for name in folds[0]}


def chance_rsum(owners: Tensor | np.ndarray) -> float:
    """Expected rsum of a random similarity; ``owners (M,)`` names each caption's image, and each image has some."""
    owned = np.bincount(np.asarray(owners))  # captions an image
    images, captions = len(owned), int(owned.sum())
    total = 0.0
    for k in CUTOFFS:
        drawn = np.arange(min(k, captions))[:, None]
        misses = np.clip((captions - owned - drawn) / (captions - drawn), 0, None).prod(0)
        total += 100 * (1 - misses.mean()) + 100 * min(1, k / images)
    return float(total)


def ranks_from_similarity(similarity: Tensor | np.ndarray, owners: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) both ways of a given similarity ``(N, M)``, as :func:`esl_fast.retrieval_ranks` defines them.

    ``owners (M,)`` names each caption's image. Raises ValueError for non-finite scores, naming the rows.
    """
    similarity, owners = torch.as_tensor(similarity), torch.as_tensor(owners)
    device = similarity.device
    if similarity.ndim != 2:
        raise ValueError(f"similarity has shape {tuple(similarity.shape)}; expected (N, M)")
    n, m = similarity.shape
    checks.owners_of(owners, n, m)
    checks.owners_within(owners, n)
    checks.finite("similarity", similarity, wait=True)
    owners = owners.to(device).long()
    # Scores are compared in it, and ranks counted.
    compute = torch.promote_types(similarity.dtype, torch.float32 if similarity.is_floating_point() else torch.float64)
    counter = RankCounter(n, m, compute, device)
    captions = slice(0, m)
    counter.set_bars(slice(0, n), captions, similarity, owners)
    block = max(1, BLOCK_ELEMENTS // max(m, 1))
    for start in range(0, n, block):
        images = slice(start, min(start + block, n))
        counter.count(images, captions, similarity[images].to(compute))
    return counter.ranks(torch.bincount(owners, minlength=n))
