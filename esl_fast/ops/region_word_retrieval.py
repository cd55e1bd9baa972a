"""Ranks and best matches by regions and words, over all pairs block by block or over a shortlist."""

import torch
from torch import Tensor

from esl_fast._autocast import without_autocast
from esl_fast.blocked.ranks import BLOCK_CAPTIONS, BLOCK_IMAGES, by_owner, count_ranks
from esl_fast.blocked.region_word_pairs import candidate_scores
from esl_fast.blocked.topk import Best, lowest_where_nan
from esl_fast.ops import checks
from esl_fast.ops.contribution import SIDES
from esl_fast.ops.ranks import retrieval_ranks
from esl_fast.ops.region_word import CaptionBlocks, check_region_word, slices
from esl_fast.ops.topk import topk


@torch.no_grad()
def region_word_ranks(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    owners: Tensor,
    region_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank (from 0) of each image's best caption among all captions, and of each caption's image among all images.

    As :func:`retrieval_ranks`, of :func:`region_word_similarity`: a rank is the number of *other* items that score at
    least as high, a tie counts against the model, an image without captions ranks M. The matrix is never held: besides
    its inputs this needs one block of 512 x 4,096 scores, and copies of word units (up to 128 MB at a time) unless
    captions come in the order of their images.

    Every tile is computed once, so a positive never competes with another rounding of its own score. Copies of an item
    elsewhere in the gallery may differ from it in the last bits and then do not tie.

    Args:
        region_units, word_units, smooth, word_lengths, region_lengths: as in :func:`region_word_similarity`.
        owners: ``(M,)`` integers, the image index of each caption, in any order.

    Returns:
        image-to-text ranks ``(N,)`` and text-to-image ranks ``(M,)``, int64.

    Raises:
        TypeError, ValueError: wrong types, shapes, lengths or owners, or (CPU) non-finite units outside padding, naming
            images or captions. On a GPU what is not finite ranks as in :func:`esl_fast.retrieval_ranks`.
    """
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths)
    n, m = region_units.shape[0], word_units.shape[0]
    checks.owners_of(owners, n, m)
    checks.same_device(region_units=region_units, owners=owners)
    checks.owners_within(owners, n)
    checks.finite_sequences("region_units", region_units, region_lengths)
    checks.finite_sequences("word_units", word_units, word_lengths)
    owned = by_owner(owners.long(), n)
    captions = CaptionBlocks(word_units, word_lengths, region_units.device, None if owned.sorted else owned.order)

    def tile(images: slice, texts: slice) -> Tensor:
        some = None if region_lengths is None else region_lengths[images]
        return captions.scores(region_units[images], texts, smooth, some)

    return count_ranks(tile, owned, torch.promote_types(region_units.dtype, torch.float32))


@torch.no_grad()
def region_word_topk(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    k: int,
    query: str = "image",
) -> tuple[Tensor, Tensor]:
    """Scores and indices of the ``k`` best captions of each image, or images of each caption, without the matrix.

    Args:
        region_units, word_units, smooth, word_lengths, region_lengths: as in :func:`region_word_similarity`; the side
            that is searched may lie on the CPU while the queries are on a GPU, it is then streamed.
        k: how many; all of them if there are fewer.
        query: which side asks: ``"image"`` finds captions, ``"text"`` finds images.

    Returns:
        scores ``(Q, k)`` in float32 (or float64) and indices, int64, descending; of equal scores the lower index comes
        first, NaN counts as -inf.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or lengths; a k below 1; another query.
    """
    device = _check_query(region_units, word_units, k, query)
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths, computed_on=device)
    n, m = region_units.shape[0], word_units.shape[0]
    queries, gallery = (n, m) if query == "image" else (m, n)
    best = Best(queries, gallery, k, torch.promote_types(region_units.dtype, torch.float32), device)
    # What is searched is the outer loop: each block of it moves once.
    if query == "image":
        word_lengths = word_lengths.cpu()
        for texts in slices(m, BLOCK_CAPTIONS):
            captions = CaptionBlocks(word_units[texts].to(device), word_lengths[texts], device)
            every = slice(0, texts.stop - texts.start)
            for images in slices(n, BLOCK_IMAGES):
                some = None if region_lengths is None else region_lengths[images]
                best.update(images, texts.start, captions.scores(region_units[images], every, smooth, some))
    else:
        captions = CaptionBlocks(word_units, word_lengths, device)
        for images in slices(n, BLOCK_IMAGES):
            regions = region_units[images].to(device)
            some = None if region_lengths is None else region_lengths[images]
            for texts in slices(m, BLOCK_CAPTIONS):
                best.update(texts, images.start, captions.scores(regions, texts, smooth, some).mT)
    return best.values, best.indices


@torch.no_grad()
@without_autocast
def region_word_rerank(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    candidates: Tensor,
    region_lengths: Tensor | None = None,
    *,
    query: str = "image",
) -> tuple[Tensor, Tensor]:
    """Score a shortlist of each query by regions and words and sort it; for shortlists of :func:`topk` or any index.

    Only the pairs of the shortlist are computed, some units being gathered at a time (32 MB on a CPU, 512 MB on a GPU).

    Args:
        region_units, word_units, smooth, word_lengths, region_lengths: as in :func:`region_word_similarity`; the side
            that is searched may lie on the CPU (or be memory-mapped) while the queries are on a GPU.
        candidates: ``(Q, k)`` integers, which captions of each image (``query="image"``) or images of each caption
            (``query="text"``) are scored.
        query: which side asks.

    Returns:
        scores ``(Q, k)`` in float32 (or float64), descending, and their indices ``(Q, k)``, int64; of equal scores the
        one that comes first in ``candidates`` stays first, NaN counts as -inf.

    Raises:
        TypeError, ValueError: wrong types, shapes or lengths; candidates out of range (checked on the CPU).
    """
    device = _check_query(region_units, word_units, 1, query)
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths, computed_on=device)
    n, m = region_units.shape[0], word_units.shape[0]
    queries, gallery = (n, m) if query == "image" else (m, n)
    if not isinstance(candidates, Tensor) or candidates.dtype not in checks.INTEGERS:
        raise TypeError("candidates holds indices; expected an integer torch.Tensor")
    if candidates.ndim != 2 or candidates.shape[0] != queries:
        raise ValueError(f"candidates has shape {tuple(candidates.shape)}; expected ({queries}, k), one row a query")
    if candidates.device.type == "cpu" and candidates.numel():
        low, high = int(candidates.min()), int(candidates.max())
        if low < 0 or high >= gallery:
            raise ValueError(f"candidates holds {low}..{high}; expected indices 0..{gallery - 1}")
    candidates = candidates.to(device).long()
    every = torch.arange(queries, device=device)
    scores = candidate_scores(
        region_units, word_units, smooth, word_lengths, region_lengths, every, candidates, query
    )
    scores, order = lowest_where_nan(scores).sort(dim=1, descending=True, stable=True)
    return scores, candidates.gather(1, order)


def rerank(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    image_units: Tensor,
    text_units: Tensor,
    k: int,
    query: str = "image",
) -> tuple[Tensor, Tensor]:
    """Two-stage retrieval: the ``k`` best of each query by a global similarity, sorted by regions and words.

    Args:
        region_units, word_units, smooth, word_lengths, region_lengths: as in :func:`region_word_similarity`.
        image_units, text_units: ``(N, U')`` and ``(M, U')``, one side folded; their dot products are the global
            similarity. :func:`topk` searches them.
        k: length of the shortlist; the whole gallery if that is smaller. For fewer results, take the first columns.
        query: which side asks: ``"image"`` finds captions, ``"text"`` finds images.

    Returns:
        region-word scores ``(Q, k)``, descending, and indices ``(Q, k)``, int64; of equal scores the better by global
        similarity comes first.

    Raises:
        TypeError, ValueError: wrong types, shapes or lengths.
    """
    _check_query(region_units, word_units, k, query)
    _check_globals(region_units, word_units, image_units, text_units)
    sides = (image_units, text_units) if query == "image" else (text_units, image_units)
    _, candidates = topk(*sides, k)
    return region_word_rerank(
        region_units, word_units, smooth, word_lengths, candidates, region_lengths, query=query
    )


@torch.no_grad()
def rerank_ranks(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    owners: Tensor,
    region_lengths: Tensor | None = None,
    *,
    image_units: Tensor,
    text_units: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) both ways, as :func:`retrieval_ranks`, of the order that :func:`rerank` makes.

    A shortlist is ordered by region-word scores, what is outside it follows in its global order. A right item in the
    shortlist ranks behind every other one there that scores at least as high; outside, it keeps its global rank (at
    least ``k``). An image's rank is the best of its captions'; without captions it ranks M.

    Args, raises: as :func:`rerank` and :func:`region_word_ranks`.

    Returns:
        image-to-text ranks ``(N,)`` and text-to-image ranks ``(M,)``, int64.
    """
    _check_query(region_units, word_units, k, "image")
    _check_globals(region_units, word_units, image_units, text_units)
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths)
    checks.finite_sequences("region_units", region_units, region_lengths)
    checks.finite_sequences("word_units", word_units, word_lengths)
    image_ranks, text_ranks = retrieval_ranks(image_units, text_units, owners)
    owners = owners.long()
    inputs = (region_units, word_units, smooth, word_lengths, region_lengths)
    options = {"image_units": image_units, "text_units": text_units, "k": k}

    def among(query: str, global_ranks: Tensor, right) -> Tensor:
        scores, indices = rerank(*inputs, query=query, **options)
        is_right = right(indices)
        bar = torch.where(is_right, scores, -torch.inf).amax(1, keepdim=True) if scores.numel() else scores
        ahead = (scores >= bar).sum(1) - 1
        return torch.where(is_right.any(1), ahead, global_ranks.clamp(min=scores.shape[1]))

    images = torch.arange(region_units.shape[0], device=owners.device)[:, None]
    image_ranks = among("image", image_ranks, lambda captions: owners[captions] == images)
    return image_ranks, among("text", text_ranks, lambda found: found == owners[:, None])


def _check_query(region_units: Tensor, word_units: Tensor, k: int, query: str) -> torch.device:
    """Where scores are computed: with the queries."""
    checks.one_of("query", query, SIDES)
    checks.count_of("k", k)
    checks.floating("region_units", region_units)
    checks.floating("word_units", word_units)
    return (region_units if query == "image" else word_units).device


def _check_globals(region_units: Tensor, word_units: Tensor, image_units: Tensor, text_units: Tensor) -> None:
    checks.matrix("image_units", image_units)
    checks.matrix("text_units", text_units, image_units.shape[1])
    for name, units, count in (
        ("image_units", image_units, len(region_units)), ("text_units", text_units, len(word_units))
    ):  # fmt: skip
        if len(units) != count:
            raise ValueError(f"{name} has {len(units)} rows; expected {count}, as many as have regions or words")
