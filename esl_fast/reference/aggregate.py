"""Measure-units of an embedding: the definition (any float dtype, differentiable, no concern for speed)."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-8
# What the next level reads: units, or vectors before they are normalised.
CHAINS = ("normalized", "raw")


def level_dims(embed_dim: int, kernel_size: int, num_levels: int) -> list[int]:
    """Sizes of levels 0..L: ``d_0 = embed_dim``, ``d_l = floor(d_{l-1} / kernel_size)``."""
    dims = [embed_dim]
    for _ in range(num_levels):
        dims.append(dims[-1] // kernel_size)
    return dims


def unit_norm(x: Tensor) -> Tensor:
    """Divide each embedding by its norm, without epsilon (a zero embedding has no direction: NaN)."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def l2norm(x: Tensor) -> Tensor:
    """``x / (||x|| + eps)``; zeros have no direction, so their gradient is 0 (that of 1/eps overflows over levels)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm + EPS)


def heuristic_level(x: Tensor, taps: Tensor) -> Tensor:
    """An s-tap filter of stride s, ``taps (s,)``; a last incomplete window is dropped."""
    s = taps.numel()
    windows = x.shape[-1] // s
    return x[..., : windows * s].unflatten(-1, (windows, s)) @ taps


def select_top2(weight: Tensor) -> Tensor:
    """Rows of ``weight`` l2-normalised, entries below the row's 2nd largest signed value set to 0.

    A tie with the 2nd largest keeps more than two entries; a row of one entry keeps it.
    Selection carries no gradient, the kept values do.
    """
    rows = l2norm(weight)
    threshold = rows.detach().topk(min(2, rows.shape[-1]), dim=-1).values[..., -1:]
    return torch.where(rows < threshold, 0, rows)  # NaN, which is not below, shows


def aggregate(x: Tensor, weights: Sequence[Tensor], *, chain: str, normalize: bool = True) -> Tensor:
    """Units of every vector in ``x (..., d)``: level 0 and levels 1..L, concatenated ``(..., sum d_l)``.

    ``weights[l-1]`` is the level's filter taps ``(s,)`` (heuristic) or its selected matrix
    ``(d_l, d_{l-1})`` (adaptive, after :func:`select_top2`). ``chain`` says what the next level reads:
    ``"normalized"`` units (images) or the ``"raw"`` vectors before normalisation (texts).
    ``normalize`` divides ``x`` by its norm first (global variant; region-word embeddings arrive normalised).
    """
    z = unit_norm(x) if normalize else x
    units = [z]
    for weight in weights:
        z = heuristic_level(z, weight) if weight.ndim == 1 else z @ weight.mT
        units.append(l2norm(z))
        if chain == "normalized":
            z = units[-1]
    return torch.cat(units, dim=-1)
