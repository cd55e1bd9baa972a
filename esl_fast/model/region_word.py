"""The region-word head: every word of a caption meets every region of an image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esl_fast import ops
from esl_fast.model import official, sequences
from esl_fast.model.parts import NormedContribution, check_levels, make_aggregator
from esl_fast.model.scores import RegionWordScores
from esl_fast.model.sequences import Sequences


class RegionWordHead(nn.Module):
    """ESL over R vectors an image and W vectors a caption (the region-word variant).

    ``a[w, r] = sum_k degree_k * c_k(w)^T D_k v_k(r)`` over levels k = 0..L, reduced to one number an (image, caption)
    pair by two attentions: words over regions and regions over words.

    Args:
        embed_dim: d, the width of regions and words.
        kernel_size: s, each level has ``floor(1/s)`` of its predecessor's units.
        num_levels: L, levels beyond the embedding itself.
        aggregator: ``"heuristic"`` (a learned filter a level) or ``"adaptive"`` (a learned sparse matrix a level).

    Raises:
        ValueError: sizes that leave a level without units.
    """

    takes_sequences = True

    def __init__(
        self, embed_dim: int, kernel_size: int = 2, num_levels: int = 8, aggregator: str = "heuristic"
    ) -> None:
        super().__init__()
        self.dims = check_levels(embed_dim, kernel_size, num_levels, aggregator)
        self.embed_dim, self.kernel_size, self.num_levels = embed_dim, kernel_size, num_levels
        self.aggregator = aggregator
        self.image = make_aggregator(aggregator, self.dims, kernel_size, "image", normalize=False)
        self.text = make_aggregator(aggregator, self.dims, kernel_size, "text", normalize=False)
        self.contribution = NormedContribution(self.dims, sharp=aggregator == "heuristic")

    def image_units(self, regions: Tensor) -> Tensor:
        """Units ``(..., U)`` of l2-normalised regions ``(..., d)``."""
        return self.image(regions)

    def text_units(self, words: Tensor) -> Tensor:
        """Units ``(..., U)`` of l2-normalised words ``(..., d)``."""
        return self.text(words)

    def degrees(self) -> Tensor:
        """Contribution degree of each level ``(L+1,)``."""
        return self.contribution.degrees()

    def scores(self, regions: Sequences, words: Sequences) -> RegionWordScores:
        """The similarity of l2-normalised regions and words, for whatever consumes it; see :meth:`forward`."""
        sequences.check("regions", regions, self.embed_dim, "image", "regions")
        sequences.check("words", words, self.embed_dim, "caption", "words")
        ops.checks.same_device(regions=regions.vectors, words=words.vectors, w=self.contribution.w)
        common = torch.promote_types(regions.vectors.dtype, words.vectors.dtype)
        region_units = self.image(_without_padding(regions).to(common))
        word_units = self.text(_without_padding(words).to(common))
        # The caption stands on the left of D: a word is folded as the image of the global variant is.
        if word_units.shape[:2].numel() <= region_units.shape[:2].numel():
            word_units = self.contribution.fold(word_units, "image")
        else:
            region_units = self.contribution.fold(region_units, "text")
        word_lengths = words.lengths
        if word_lengths is None:
            word_lengths = torch.full(words.vectors.shape[:1], words.vectors.shape[1], device=words.vectors.device)
        return RegionWordScores(
            region_units, word_units, self.contribution.temp_scale.exp(), word_lengths, regions.lengths
        )

    def forward(
        self, regions: Tensor, words: Tensor, word_lengths: Tensor, region_lengths: Tensor | None = None
    ) -> Tensor:
        """Similarity ``(N, M)`` of regions ``(N, R, d)`` and words ``(M, W, d)``, l2-normalised, any float dtype.

        Words from ``word_lengths[j]`` on and regions from ``region_lengths[i]`` on (None: no padding) are padding: what
        they hold changes nothing. The result is in float32 (float64 if the inputs are).

        Raises TypeError or ValueError for wrong types, sizes or devices, and (lengths or features on a CPU) for
        captions without words, images without regions, and non-finite features.
        """
        return self.scores(Sequences(regions, region_lengths), Sequences(words, word_lengths)).matrix()

    @classmethod
    def from_official(cls, contents: Mapping[str, Any]) -> "RegionWordHead":
        """Head from the official code's weights: the similarity's state dict, or a whole checkpoint that holds it.

        Aggregator, embedding size and levels follow from the shapes. Raises ValueError naming what is missing.
        """
        config, weights = official.read_head(official.similarity_part(contents), official.REGION_WORD)
        head = cls(**config).to(next(iter(weights.values())).dtype)
        head.load_state_dict(weights)
        return head

    def to_official(self) -> dict[str, Tensor]:
        """The head's weights under the official names; :meth:`from_official` restores them exactly."""
        return official.write_head(self.state_dict(), self.aggregator, official.REGION_WORD)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, kernel_size={self.kernel_size}, num_levels={self.num_levels}, "
            f"aggregator={self.aggregator!r}"
        )


def _without_padding(features: Sequences) -> Tensor:
    padding = features.padding()
    return features.vectors if padding is None else features.vectors.masked_fill(padding.unsqueeze(-1), 0)
