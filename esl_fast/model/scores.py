"""All-pairs similarities that are not held as a matrix, whatever head they come from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esl_fast import ops
from esl_fast.ops.hinge import hinge_loss, region_word_hinge_loss
from esl_fast.ops.region_word import region_word_similarity
from esl_fast.ops.region_word_retrieval import region_word_ranks

Block = tuple[slice, slice, Tensor]
# Bytes of similarity computed at a time where it is handed out in blocks.
BLOCK_BYTES = 256 << 20


class Scores:
    """Similarity of N images and M captions, ``shape == (N, M)``."""

    shape: tuple[int, int]

    def matrix(self) -> Tensor:
        """``(N, M)``, differentiable."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(N, U)`` and ``(M, U)`` whose product is the matrix; differentiable."""
        raise NotImplementedError

    def hinge_loss(self, ids: Tensor | None, *, margin: float, hardest: bool) -> Tensor:
        """As :func:`esl_fast.ops.hinge.hinge_loss`, ``ids (N,)`` naming the image of each row and column."""
        return hinge_loss(self.matrix(), ids, ids, margin=margin, hardest=hardest)

    def ranks(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`esl_fast.retrieval_ranks`; ``owners (M,)`` names each caption's image."""
        raise NotImplementedError

    def part(self, images: slice, captions: slice) -> "Scores":
        """The scores of some images and some captions."""
        raise NotImplementedError

    def check_finite(self) -> None:
        """ValueError naming the images or captions whose scores cannot be finite; waits for a GPU."""
        raise NotImplementedError

    def blocks(self) -> Iterator[Block]:
        """``(images, captions, scores)``, all captions of the first images before the next images."""
        images, captions = self.shape
        size = max(1, BLOCK_BYTES // (4 * max(captions, 1)))
        for start in range(0, images, size):
            rows, columns = slice(start, min(start + size, images)), slice(0, captions)
            yield rows, columns, self.part(rows, columns).matrix()


@dataclass
class InnerProducts(Scores):
    """``image (N, U) . text (M, U)``: any global head."""

    image: Tensor
    text: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.shape[0], self.text.shape[0]

    def matrix(self) -> Tensor:
        return ops.similarity(self.image, self.text)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.image, self.text

    def ranks(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        return ops.retrieval_ranks(self.image, self.text, owners)

    def part(self, images: slice, captions: slice) -> "InnerProducts":
        return InnerProducts(self.image[images], self.text[captions])

    def check_finite(self) -> None:
        ops.checks.finite("units of images", self.image, wait=True)
        ops.checks.finite("units of captions", self.text, wait=True)


@dataclass
class RegionWordScores(Scores):
    """Every word meets every region: units ``(N, R, U)`` and ``(M, W, U)``, one side folded."""

    region_units: Tensor
    word_units: Tensor
    smooth: Tensor
    word_lengths: Tensor
    region_lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.region_units.shape[0], self.word_units.shape[0]

    @property
    def operands(self) -> dict[str, Tensor | None]:
        """Arguments of the `region_word` functions."""
        # `vars` and `fields` PyTorch 2.11 does not compile.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def matrix(self) -> Tensor:
        return region_word_similarity(**self.operands)

    def factors(self) -> tuple[Tensor, Tensor]:
        # InfoNCE takes factors: the matrix is its own, for one more product, which a batch is too small to feel.
        matrix = self.matrix()
        return matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)

    def hinge_loss(self, ids: Tensor | None, *, margin: float, hardest: bool) -> Tensor:
        # Where only the hardest negatives count, few pairs have a gradient.
        return region_word_hinge_loss(**self.operands, image_ids=ids, text_ids=ids, margin=margin, hardest=hardest)

    def ranks(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        return region_word_ranks(**self.operands, owners=owners)

    def part(self, images: slice, captions: slice) -> "RegionWordScores":
        return replace(
            self,
            region_units=self.region_units[images],
            word_units=self.word_units[captions],
            word_lengths=self.word_lengths[captions],
            region_lengths=None if self.region_lengths is None else self.region_lengths[images],
        )

    def check_finite(self) -> None:
        ops.checks.finite_sequences("units of regions", self.region_units, self.region_lengths, wait=True)
        ops.checks.finite_sequences("units of words", self.word_units, self.word_lengths, wait=True)
