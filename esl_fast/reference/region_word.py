"""Region-word similarity of units: the definition, one caption at a time."""

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

EPS = 1e-8
SLOPE = 0.1


def region_word_similarity(
    region_units: Tensor,
    word_units: Tensor,
    smooth: Tensor | float,
    word_lengths: Tensor,
    region_lengths: Tensor | None = None,
) -> Tensor:
    """``S (N, M)`` of images ``region_units (N, R, U)`` and captions ``word_units (M, W, U)``, one side folded.

    ``a[w, r] = word . region``, ``b = leaky_relu(tanh(a))``; words attend over regions by
    ``softmax_r(smooth * b / ||b||_w)``, regions over words by ``softmax_w(smooth * b / ||b||_r)``, and ``S`` is the
    mean attended ``a`` of the words plus that of the regions. Words from ``word_lengths[j]`` on and regions from
    ``region_lengths[i]`` on are padding and never read.
    """
    n, num_regions, _ = region_units.shape
    if region_lengths is None:
        region_lengths = torch.full((n,), num_regions)
    rows = []
    for regions, r in zip(region_units, region_lengths.tolist(), strict=True):
        captions = zip(word_units, word_lengths.tolist(), strict=True)
        row = [attend(words[:w] @ regions[:r].mT, smooth) for words, w in captions]
        rows.append(torch.stack(row) if row else regions.new_zeros(0))
    return torch.stack(rows) if rows else region_units.new_zeros(0, word_units.shape[0])


def attend(a: Tensor, smooth: Tensor | float) -> Tensor:
    """Reduce one block ``a (W, R)`` to its number."""
    b = leaky_relu(torch.tanh(a), SLOPE)
    to_regions = torch.softmax(smooth * b / (torch.linalg.vector_norm(b, dim=0, keepdim=True) + EPS), dim=1)
    to_words = torch.softmax(smooth * b / (torch.linalg.vector_norm(b, dim=1, keepdim=True) + EPS), dim=0)
    return (a * to_regions).sum(1).mean() + (a * to_words).sum(0).mean()
