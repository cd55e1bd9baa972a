"""Similarities made of others: ensembles, two-stage retrieval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esl_fast.evaluation.metrics import ranks_from_similarity
from esl_fast.model.scores import InnerProducts, RegionWordScores, Scores
from esl_fast.ops.region_word_retrieval import rerank_ranks


@dataclass
class Reranked(Scores):
    """The ``k`` best by a global similarity, sorted by regions and words: an order, not a matrix."""

    scores: RegionWordScores
    shortlist: InnerProducts
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.scores.shape

    def ranks(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        sides = {"image_units": self.shortlist.image, "text_units": self.shortlist.text}
        return rerank_ranks(**self.scores.operands, owners=owners, k=self.k, **sides)

    def part(self, images: slice, captions: slice) -> "Reranked":
        return Reranked(self.scores.part(images, captions), self.shortlist.part(images, captions), self.k)


def reranked(scores: RegionWordScores, shortlist: Scores, k: int) -> Reranked:
    """Two-stage retrieval. Raises ValueError unless what is sorted was found by a global similarity."""
    if not isinstance(shortlist, InnerProducts):
        raise ValueError("a shortlist is found by a global similarity; its checkpoint's is a region-word one")
    return Reranked(scores, shortlist, k)


@dataclass
class MeanScores(Scores):
    """The mean of several similarities of the same images and captions; see :func:`mean_scores`."""

    parts: list[Scores]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def matrix(self) -> Tensor:
        return torch.stack([part.matrix() for part in self.parts]).mean(0)

    def ranks(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        # What several region-word similarities add up to has no factors: this one matrix is held, on the CPU.
        matrix = torch.empty(self.shape)
        for images, captions, scores in self.blocks():
            matrix[images, captions] = scores.float().cpu()
        return ranks_from_similarity(matrix, owners.cpu())

    def part(self, images: slice, captions: slice) -> "MeanScores":
        return MeanScores([part.part(images, captions) for part in self.parts])


def mean_scores(parts: Sequence[Scores]) -> Scores:
    """The mean of similarities: of inner products, the inner product of their concatenated sides."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, InnerProducts) for part in parts):
        return MeanScores(list(parts))
    return InnerProducts(
        torch.cat([part.image / len(parts) for part in parts], 1), torch.cat([part.text for part in parts], 1)
    )
