"""The region-word head: every word of a caption meets every region of an image."""

import torch
from torch import Tensor

from esl_fast import ops
from esl_fast._eager import is_exporting
from esl_fast.model import official, sequences
from esl_fast.model.parts import LevelHead, NormedContribution
from esl_fast.model.scores import RegionWordScores
from esl_fast.model.sequences import Sequences


class RegionWordHead(LevelHead):
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
    layout = official.REGION_WORD
    normalize = False

    def make_contribution(self) -> NormedContribution:
        return NormedContribution(self.dims, sharp=self.aggregator == "heuristic")

    def image_units(self, regions: Tensor) -> Tensor:
        """Units ``(..., U)`` of l2-normalised regions ``(..., d)``."""
        return self.image(regions)

    def text_units(self, words: Tensor) -> Tensor:
        """Units ``(..., U)`` of l2-normalised words ``(..., d)``."""
        return self.text(words)

    def scores(self, regions: Sequences, words: Sequences) -> RegionWordScores:
        """The similarity of l2-normalised regions and words, for whatever consumes it; see :meth:`forward`."""
        sequences.check("regions", regions, self.embed_dim, "image")
        sequences.check("words", words, self.embed_dim, "caption")
        ops.checks.same_device(regions=regions.vectors, words=words.vectors, w=self.contribution.w)
        common = torch.promote_types(regions.vectors.dtype, words.vectors.dtype)
        region_vectors, word_vectors = regions.zeroed(), words.zeroed()
        ops.checks.finite("regions", region_vectors)
        ops.checks.finite("words", word_vectors)
        region_units, word_units = self.image(region_vectors.to(common)), self.text(word_vectors.to(common))
        # The caption stands on the left of D: a word is folded as the image of the global variant is.
        # What is exported has to serve all sizes.
        if is_exporting() or word_units.shape[:2].numel() <= region_units.shape[:2].numel():
            word_units = self.contribution(word_units, "image")
        else:
            region_units = self.contribution(region_units, "text")
        smooth = self.contribution.temp_scale
        smooth = smooth.to(torch.promote_types(smooth.dtype, torch.float32)).exp()
        return RegionWordScores(region_units, word_units, smooth, words.counts(), regions.lengths)

    def operands(
        self, regions: Tensor, words: Tensor, word_lengths: Tensor, region_lengths: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Arguments, as :meth:`forward` takes them, to those of the `region_word` functions of `esl_fast`.

        ``esl_fast.region_word_topk(**head.operands(regions, words, word_lengths), k=10)``
        """
        return self.scores(Sequences(regions, region_lengths), Sequences(words, word_lengths)).operands

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
