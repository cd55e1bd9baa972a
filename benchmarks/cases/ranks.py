"""Ranks both ways: from raw features (an evaluation) and from finished units."""

import copy

import torch
from torch import Tensor

import esl_fast
from benchmarks.cases import common
from benchmarks.registry import DTYPES, TOLERANCE, Case, Parity, Problem


def from_matrix(similarity: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) as one vectorises them, given the whole matrix."""
    n, m = similarity.shape
    positive = similarity[owners, torch.arange(m, device=owners.device)]
    text_to_image = (similarity >= positive).sum(0) - 1
    best = similarity.new_full((n,), -torch.inf).scatter_reduce(0, owners, positive, "amax")
    image_to_text = (similarity >= best[:, None]).sum(1) - 1
    return image_to_text, text_to_image


def rank_error(ranks: Tensor, scores: Tensor, right: Tensor) -> float:
    """By how much, relative to the largest score, scores must be off to explain ``ranks (k,)``.

    ``scores (k, c)`` are exact, ``right (k,)`` is the column of each query's answer.
    """
    own = scores.gather(1, right[:, None])
    others = scores.scatter(1, right[:, None], -torch.inf).sort(1, descending=True).values
    others = torch.cat([torch.full_like(own, torch.inf), others], 1)
    # So many others reach the right one's score; the next does not.
    reaching, following = others.gather(1, ranks[:, None]), others.gather(1, ranks[:, None] + 1)
    return float(torch.maximum(own - reaching, following - own).clamp(min=0).max() / scores.abs().max())


def compare(ranks: tuple[Tensor, Tensor], score, owners: Tensor, tolerance: float) -> Parity:
    """Against exact scores of some images and some captions, ``score(images, captions)`` with None for all."""
    image_ranks, text_ranks = ranks
    (n, m), device = (len(image_ranks), len(text_ranks)), owners.device
    (rows, images), (columns, captions) = common.sample(n, device), common.sample(m, device)
    scores = score(rows, None)
    best = scores.masked_fill(owners != rows[:, None], -torch.inf).argmax(1)
    error = rank_error(image_ranks[rows], scores, best)
    error = max(error, rank_error(text_ranks[columns], score(None, columns).mT, owners[columns]))
    return Parity(error, tolerance, f"{images} images, {captions} captions")


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    return (x if rows is None else x[rows]).double()


def evaluation(device: torch.device, dtype: str, n: int, m: int, aggregator: str) -> Problem:
    """Raw features to ranks both ways."""
    head = common.make_head(aggregator, device).eval()
    naive_head = copy.deepcopy(head).to(DTYPES[dtype])
    images, texts, owners = common.make_features(n, m, device, DTYPES[dtype])
    by_level = common.compiled(lambda head, x, y: from_matrix(common.by_level(head, x, y), owners))

    def parity() -> Parity:
        exact = common.exact(head)
        return compare(
            ours(), lambda i, j: common.by_level(exact, take(images, i), take(texts, j)), owners, TOLERANCE[dtype]
        )

    no_grad = torch.no_grad()
    ours = no_grad(lambda: esl_fast.retrieval_ranks(*head.sides(images, texts), owners))
    return Problem(
        {
            "ours": ours,
            "pytorch": no_grad(lambda: from_matrix(common.by_level(naive_head, images, texts), owners)),
            "compiled": no_grad(lambda: by_level(naive_head, images, texts)),
            "cosine": lambda: from_matrix(common.cosine(images, texts), owners),
            "limit": common.bare_product(n, m, device, DTYPES[dtype]),
        },
        no_grad(parity),
        2.0 * n * m * common.UNITS,
    )


def ranks(device: torch.device, dtype: str, n: int, m: int) -> Problem:
    """Finished units to ranks both ways."""
    images, texts, owners = common.make_sides(n, m, device, DTYPES[dtype])

    def ours() -> tuple[Tensor, Tensor]:
        return esl_fast.retrieval_ranks(images, texts, owners)

    def parity() -> Parity:
        # Scores of low-precision units are exact up to float32 accumulation.
        tolerance = TOLERANCE["tf32" if dtype == "tf32" else "float32"]
        return compare(ours(), lambda i, j: take(images, i) @ take(texts, j).mT, owners, tolerance)

    return Problem(
        {
            "ours": ours,
            "pytorch": lambda: from_matrix(images @ texts.mT, owners),
            "limit": common.bare_product(n, m, device, DTYPES[dtype]),
        },
        parity,
        2.0 * n * m * common.UNITS,
    )


def cases(device: str) -> list[Case]:
    both = [{"aggregator": name} for name in common.AGGREGATORS]
    measured = ("ours", "pytorch")
    if device == "cpu":
        return [
            Case(evaluation, 1000, 5000, options=both[0], memory=measured, quick=True),
            *(Case(evaluation, 5000, 25_000, options=o, memory=measured) for o in both),
        ]
    return [
        Case(ranks, 5000, 25_000, "bfloat16", memory=measured, quick=True),
        Case(ranks, 100_000, 500_000, "bfloat16", memory=("ours",), quick=True),
        *(Case(evaluation, 5000, 25_000, "bfloat16", o) for o in both),
        Case(evaluation, 1000, 5000, "bfloat16", both[0]),
    ]
