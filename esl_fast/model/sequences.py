"""What a tower returns for an item of several vectors: regions, patches, words."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esl_fast.ops import checks
from esl_fast.reference.aggregate import l2norm


class Sequences(NamedTuple):
    """Vectors ``(n, L, d)``, of which the first ``lengths (n,)`` of each item are real (None: all of them)."""

    vectors: Tensor
    lengths: Tensor | None = None

    def float(self) -> "Sequences":
        return self._replace(vectors=self.vectors.float())

    def padding(self) -> Tensor | None:
        """``(n, L)``, True where a vector is not real; None where all are."""
        if self.lengths is None:
            return None
        positions = torch.arange(self.vectors.shape[1], device=self.vectors.device)
        return positions >= self.lengths.to(self.vectors.device)[:, None]

    def zeroed(self) -> Tensor:
        """The vectors, those that are not real 0."""
        padding = self.padding()
        return self.vectors if padding is None else self.vectors.masked_fill(padding.unsqueeze(-1), 0)

    def counts(self) -> Tensor:
        """``(n,)``, how many vectors of each item are real."""
        n, length, _ = self.vectors.shape
        return torch.full((n,), length, device=self.vectors.device) if self.lengths is None else self.lengths

    def unit_norm(self) -> "Sequences":
        """Every vector divided by its norm, padding zeroed."""
        return self._replace(vectors=l2norm(self.zeroed()))

    def mean(self) -> Tensor:
        """The mean ``(n, d)`` of the real vectors of each item."""
        if self.lengths is None:
            return self.vectors.mean(1)
        return self.zeroed().sum(1) / self.lengths.to(self.vectors.device).unsqueeze(-1)


class SpecialTokens(NamedTuple):
    """Ids that enclose a caption's words, and the one that hides a word; 0 pads."""

    start: int
    end: int
    mask: int


Features = Tensor | Sequences


def concatenate(parts: Sequence[Features]) -> Features:
    """Items of several batches in one; sequences are padded to the longest."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    longest = max(part.vectors.shape[1] for part in parts)
    vectors = [F.pad(part.vectors, (0, 0, 0, longest - part.vectors.shape[1])) for part in parts]
    if all(part.lengths is None for part in parts) and len({part.vectors.shape[1] for part in parts}) == 1:
        return Sequences(torch.cat(vectors))
    return Sequences(torch.cat(vectors), torch.cat([part.counts() for part in parts]))


def vectors_of(features: Features) -> Tensor:
    return features.vectors if isinstance(features, Sequences) else features


def with_vectors(features: Features, vectors: Tensor) -> Features:
    """The same features with other vectors."""
    return features._replace(vectors=vectors) if isinstance(features, Sequences) else vectors


def check(name: str, features: Sequences, width: int, item: str) -> None:
    """One clear error for what a head cannot take of ``"regions"`` or ``"words"``, the parts of an ``item``."""
    checks.floating(name, features.vectors)
    shape = tuple(features.vectors.shape)
    if len(shape) != 3 or shape[2] != width or shape[1] == 0:
        raise ValueError(f"{name} has shape {shape}; expected (n, length, {width}) with a length of at least 1")
    if features.lengths is not None:
        checks.lengths_of(f"{name.removesuffix('s')}_lengths", features.lengths, shape[0], shape[1], item, name)
