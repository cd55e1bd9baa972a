"""Similarity of images by their regions to captions by their words."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esl_fast import reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_transformed
from esl_fast.blocked import region_word as blocked
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels

if TYPE_CHECKING:
    from esl_fast.kernels.region_word import Packing

# Word units copied at a time where captions are taken in another order than they lie in memory.
GATHERED_BYTES = 128 << 20


@without_autocast
def region_word_similarity(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    packing: "Packing | None" = None,
) -> Tensor:
    """Reduce the products of all words and all regions to one score an image and caption; differentiable.

    Args:
        region_units: units of every region, ``(N, R, U)``, any float dtype.
        word_units: units of every word, ``(M, W, U)``; contribution (degree_k * D_k) is folded into either side.
        smooth: inverse temperature of both attentions, a scalar; at best on the device of the units.
        word_lengths: words of each caption, ``(M,)`` integers in 1..W. Words past them are padding and never read.
            On the CPU they are packed without padding; on a GPU nothing waits for them, and padding is multiplied too.
        region_lengths: regions of each image, ``(N,)`` integers in 1..R; None: all R.
        packing: what :func:`pack_captions` made of ``word_units`` and ``word_lengths``, for captions that are scored
            more than once.

    Returns:
        Scores ``(N, M)``, float32 (float64 if the units are).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; lengths out of range (where they lie on the CPU; on a GPU
            words count as at least 1 and at most W).
    """
    smooth = check_region_word(region_units, word_units, smooth, word_lengths, region_lengths)
    if packing is not None and len(packing.order) != word_units.shape[0]:
        raise ValueError(f"packing is of {len(packing.order)} captions, given {word_units.shape[0]}")
    if _kernel_serves(region_units, word_units):
        from esl_fast.kernels import region_word as kernel  # Triton is imported only where it is used

        return kernel.region_word_similarity(
            region_units, word_units, smooth, word_lengths, region_lengths, packing=packing
        )
    word_lengths = word_lengths.to(region_units.device)
    if region_lengths is not None:
        region_lengths = region_lengths.to(region_units.device)
    if is_transformed():
        compute = torch.promote_types(region_units.dtype, torch.float32)
        units = region_units.to(compute), word_units.to(compute)
        return reference.region_word.region_word_similarity(*units, smooth.to(compute), word_lengths, region_lengths)
    return blocked.region_word_similarity(region_units, word_units, smooth, word_lengths, region_lengths)


def pack_captions(word_units: Tensor, word_lengths: Tensor) -> "Packing | None":
    """Where the words ``(M, W, U)`` of captions of ``word_lengths (M,)`` go when they are packed without padding.

    Waits once for lengths that lie on a GPU; :func:`region_word_similarity` then need not. None where PyTorch serves,
    which packs as it goes.
    """
    if not _kernel_serves(word_units, word_units):
        return None
    word_lengths = word_lengths.cpu()
    checks.lengths_of("word_lengths", word_lengths, word_units.shape[0], word_units.shape[1], "caption", "words")
    from esl_fast.kernels import region_word as kernel  # Triton is imported only where it is used

    return kernel.pack_captions(word_lengths, word_units.shape[1], word_units.device, wait=True)


def _kernel_serves(region_units: Tensor, word_units: Tensor) -> bool:
    if not use_kernels(region_units, word_units):
        return False
    from esl_fast.kernels import region_word as kernel  # Triton is imported only where it is used

    return word_units.shape[1] <= kernel.MAX_WORDS


class CaptionBlocks:
    """Captions ``(M, W, U)`` that many blocks of images meet: lengths are waited for and words packed once.

    ``order (M,)`` says in which order they are counted, None: as they lie. Units may lie on another device than
    ``device``, where scores are computed; they then move there block by block.
    """

    def __init__(self, word_units: Tensor, word_lengths: Tensor, device: torch.device, order: Tensor | None = None):
        self.units, self.device = word_units, device
        self.lengths = word_lengths.cpu()
        self.order = None if order is None else order.cpu()
        self._packings: dict[tuple[int, int], Packing | None] = {}

    def _pieces(self, captions: slice) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Key, units and lengths of parts of a block."""
        if self.order is None:
            yield (captions.start, captions.stop), self.units[captions].to(self.device), self.lengths[captions]
            return
        caption_bytes = self.units.shape[1] * self.units.shape[2] * self.units.element_size()
        size = max(1, GATHERED_BYTES // max(caption_bytes, 1))
        for first in range(captions.start, captions.stop, size):
            last = min(first + size, captions.stop)
            index = self.order[first:last]
            lengths = self.lengths[index]
            units = self.units[:, : int(lengths.max())]
            yield (first, last), units[index.to(units.device)].to(self.device), lengths

    def scores(
        self, region_units: Tensor, captions: slice, smooth: Tensor, region_lengths: Tensor | None = None
    ) -> Tensor:
        """Scores ``(n, captions)`` of ``region_units (n, R, U)`` with the captions ``captions``."""
        parts = []
        for key, units, lengths in self._pieces(captions):
            if key not in self._packings:
                self._packings[key] = pack_captions(units, lengths)
            packing = self._packings[key]
            parts.append(region_word_similarity(region_units, units, smooth, lengths, region_lengths, packing=packing))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def check_region_word(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    computed_on: torch.device | None = None,
) -> Tensor:
    """Raise what :func:`region_word_similarity` raises; returns smooth, 0-d, where scores are computed.

    That is the one device of all units unless ``computed_on`` names it.
    """
    checks.floating("region_units", region_units)
    checks.floating("word_units", word_units)
    if region_units.ndim != 3 or region_units.shape[1] == 0:
        raise ValueError(f"region_units has shape {tuple(region_units.shape)}; expected (N, R, U) with R >= 1")
    n, regions, width = region_units.shape
    if word_units.ndim != 3 or word_units.shape[1] == 0 or word_units.shape[2] != width:
        raise ValueError(f"word_units has shape {tuple(word_units.shape)}; expected (M, W, {width}) with W >= 1")
    if computed_on is None:
        checks.same_device(region_units=region_units, word_units=word_units)
        computed_on = region_units.device
    if word_units.dtype != region_units.dtype:
        raise TypeError(f"region_units is {region_units.dtype} and word_units {word_units.dtype}; expected one dtype")
    smooth = checks.scalar("smooth", smooth, torch.promote_types(region_units.dtype, torch.float32), computed_on)
    checks.lengths_of("word_lengths", word_lengths, word_units.shape[0], word_units.shape[1], "caption", "words")
    if region_lengths is not None:
        checks.lengths_of("region_lengths", region_lengths, n, regions, "image", "regions")
    return smooth
