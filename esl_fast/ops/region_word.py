"""Similarity of images by their regions to captions by their words."""

from collections.abc import Iterator

import torch
from torch import Tensor

from esl_fast.blocked import region_word as blocked
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels


def region_word_similarity(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """Reduce the products of all words and all regions to one score an image and caption; differentiable.

    Args:
        region_units: units of every region, ``(N, R, U)``, any float dtype.
        word_units: units of every word, ``(M, W, U)``; contribution (degree_k * D_k) is folded into either side.
        smooth: inverse temperature of both attentions, a scalar; at best on the device of the units.
        word_lengths: words of each caption, ``(M,)`` integers in 1..W. Words past them are padding and never read.
            On the CPU they are packed without padding; on a GPU nothing waits for them, and padding is multiplied too.
        region_lengths: regions of each image, ``(N,)`` integers in 1..R; None: all R.

    Returns:
        Scores ``(N, M)``, float32 (float64 if the units are).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; lengths out of range (checked where they lie on the CPU).
    """
    checks.floating("region_units", region_units)
    checks.floating("word_units", word_units)
    if region_units.ndim != 3 or region_units.shape[1] == 0:
        raise ValueError(f"region_units has shape {tuple(region_units.shape)}; expected (N, R, U) with R >= 1")
    n, regions, width = region_units.shape
    if word_units.ndim != 3 or word_units.shape[1] == 0 or word_units.shape[2] != width:
        raise ValueError(f"word_units has shape {tuple(word_units.shape)}; expected (M, W, {width}) with W >= 1")
    checks.same_device(region_units=region_units, word_units=word_units)
    if word_units.dtype != region_units.dtype:
        raise TypeError(f"region_units is {region_units.dtype} and word_units {word_units.dtype}; expected one dtype")
    if not isinstance(smooth, Tensor):
        dtype = torch.promote_types(region_units.dtype, torch.float32)
        smooth = torch.full((), smooth, dtype=dtype, device=region_units.device)
    if smooth.numel() != 1:
        raise ValueError(f"smooth has shape {tuple(smooth.shape)}; expected a scalar")
    smooth = smooth.reshape(()).to(region_units.device)
    _check_lengths("word_lengths", word_lengths, word_units.shape[0], word_units.shape[1], "caption", "words")
    if region_lengths is not None:
        _check_lengths("region_lengths", region_lengths, n, regions, "image", "regions")
    if use_kernels(region_units, word_units):
        from esl_fast.kernels import region_word as kernel  # Triton is imported only where it is used

        if word_units.shape[1] <= kernel.MAX_WORDS:
            return kernel.region_word_similarity(region_units, word_units, smooth, word_lengths, region_lengths)
    if region_lengths is not None:
        region_lengths = region_lengths.to(region_units.device)
    return blocked.region_word_similarity(region_units, word_units, smooth, word_lengths, region_lengths)


def region_word_blocks(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
    *,
    block_images: int = 512,
    block_captions: int = 4096,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ``(images, captions, scores)`` of :func:`region_word_similarity` block by block, images outermost."""
    return blocked.similarity_blocks(
        region_units, word_units, smooth, word_lengths, region_lengths,
        block_images=block_images, block_captions=block_captions, similarity=region_word_similarity,
    )  # fmt: skip


def _check_lengths(name: str, lengths: Tensor, count: int, longest: int, item: str, parts: str) -> None:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name} is {kind}; expected an integer tensor ({count},)")
    if lengths.shape != (count,):
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}; expected ({count},), one a {item}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or count == 0:
        return
    if int(lengths.min()) < 1:
        worst = int(lengths.argmin())
        found = f"no {parts}" if lengths[worst] == 0 else f"{int(lengths[worst])} {parts}"
        raise ValueError(f"{item} {worst} has {found} ({name}); expected 1..{longest}")
    if int(lengths.max()) > longest:
        worst = int(lengths.argmax())
        raise ValueError(f"{item} {worst} has {int(lengths[worst])} {parts} ({name}); expected 1..{longest}")
