"""Measure-units on a CPU without gradients, block by block of embeddings.

Every level is first made of raw predecessors, and all are divided by their norms at the end. Where the definition
reads normalised units, a level is that of the raw ones over the predecessor's divisor, so that only the epsilon of its
own divisor differs: see :meth:`Units._scales`.
"""

import math
import threading
import warnings
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from esl_fast.reference.aggregate import EPS, level_dims

# Vectors handled at a time.
BLOCK = 2048
# Windows of a filter that one row of a product covers.
WINDOWS = 8
# Entries of an embedding that one product turns over.
TURNED = 32
# Blocks of how many sizes find their views made.
ROOMS = 4
# Share of kept entries beyond which a dense product is faster: rows of fewer than 40 entries, and many ties.
DENSE = 1 / 20


class Units(threading.local):
    """What makes units of embeddings `x (n, d)`, float32 or float64, in memory that each thread keeps for its next x.

    Memory taken anew for every block would be paid for page by page, and views of it would, each, find the caches cold
    after a matrix product. What a call returns therefore lasts until the thread's next, unless `out` is given, which
    :meth:`empty` makes.
    """

    def __init__(self, sizes: Tensor, *, chain: str, normalize: bool):
        """`sizes (L,)`: how many times too small the raw vectors of each level are made."""
        self.chained, self.normalize = chain == "normalized", normalize
        sizes = sizes.double() if self.chained else sizes.double().cumprod(0)
        self.eps = (EPS / sizes).clamp_(max=1e30)
        self._memory: Tensor | None = None
        self._rooms: dict[torch.Size, SimpleNamespace] = {}

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if x.shape not in self._rooms:
            with torch.inference_mode(False):  # it may be written in that mode and out of it
                room = self._make_room(x)
            if len(self._rooms) == ROOMS:
                self._rooms.clear()
            self._rooms[x.shape] = room
        room = self._rooms[x.shape]
        levels = room.levels if out is None else self._levels(out, x)
        self._make(x, levels, room)
        return room.own if out is None else out

    def empty(self, x: Tensor) -> Tensor:
        """`(n, U)`, uninitialised."""
        raise NotImplementedError

    def _dims(self, x: Tensor) -> list[int]:
        raise NotImplementedError

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        """Levels of `out (n, U)`, laid out as :meth:`_make` takes them."""
        raise NotImplementedError

    def _make_room(self, x: Tensor) -> SimpleNamespace:
        """Memory for as many vectors: their `own` units and `levels`, norms, and what else :meth:`_make` writes."""
        raise NotImplementedError

    def _make(self, x: Tensor, levels: Sequence[Tensor], room: SimpleNamespace) -> None:
        raise NotImplementedError

    def _parts(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Memory for so many entries a vector of `x`, each flat."""
        sizes = [len(x) * width for width in widths]
        if self._memory is None or sum(sizes) > len(self._memory):
            self._rooms.clear()
            self._memory = torch.empty(sum(sizes), dtype=x.dtype)
        return list(self._memory[: sum(sizes)].split(sizes))

    def _set_norms(self, norms: Tensor, room: SimpleNamespace) -> None:
        room.norms, room.each_norm, room.later_norms = norms, norms.unbind(), norms[1:]
        room.eps = self.eps.to(norms.dtype).view(-1, *[1] * (norms.ndim - 1))
        room.each_eps = room.eps.unbind()

    def _scales(self, room: SimpleNamespace) -> None:
        """Overwrite norms of raw vectors by what each vector is multiplied by.

        ``u_k = z_k / (|z_k| + eps)`` of ``z_k = A_k u_{k-1} = A_k z_{k-1} / n_{k-1}`` has the divisor ``n_k = |A_k
        z_{k-1}| + eps * n_{k-1}``; in the raw chain, whose z_0 alone is normalised, ``|z_k| + eps * n_0``.
        """
        first, *later = room.each_norm
        if not self.normalize:
            first.fill_(1)
        if self.chained:
            for previous, norm, eps in zip(room.each_norm, later, room.each_eps, strict=False):
                norm.addcmul_(previous, eps)
        else:
            room.later_norms.addcmul_(first, room.eps)
        room.norms.reciprocal_()


class FilteredUnits(Units):
    """Of the heuristic aggregator, `taps (L, s)`. Units lie row by row.

    A level is a skinny product: a few windows at a time, times a block-diagonal matrix of taps.
    """

    def __init__(self, taps: Tensor, *, chain: str, normalize: bool):
        sizes = taps.abs().amax(1)
        sizes = torch.where(sizes > 0, sizes, 1)
        super().__init__(sizes, chain=chain, normalize=normalize)
        diagonal = torch.eye(WINDOWS, dtype=taps.dtype)
        self.filters = (taps / sizes[:, None])[:, None, :, None] * diagonal[:, None, :]  # (L, windows, s, windows)

    def empty(self, x: Tensor) -> Tensor:
        width = sum(self._dims(x))
        return x.new_empty(len(x), spread(width))[:, :width]

    def _dims(self, x: Tensor) -> list[int]:
        return level_dims(x.shape[1], self.filters.shape[2], len(self.filters))

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        return out.split(self._dims(x), 1)

    def _make_room(self, x: Tensor) -> SimpleNamespace:
        dims, n, s = self._dims(x), len(x), self.filters.shape[2]
        own, *raw, norms = self._parts(x, [spread(sum(dims)), *dims[1:], len(dims)])
        own = own.view(n, spread(sum(dims)))[:, : sum(dims)]
        raw = [z.view(n, d) for z, d in zip(raw, dims[1:], strict=True)]
        room = SimpleNamespace(own=own, levels=self._levels(own, x), raw=raw, products=[])
        self._set_norms(norms.view(len(dims), n, 1), room)
        for taps, z, d in zip(self.filters, raw, dims[1:], strict=True):
            windows = max(w for w in range(1, WINDOWS + 1) if d % w == 0)
            matrix = taps[:windows, :, :windows].reshape(s * windows, windows)
            room.products.append((matrix, s * d, z.view(n * d // windows, windows)))
        return room

    def _make(self, x: Tensor, levels: Sequence[Tensor], room: SimpleNamespace) -> None:
        raw = [x, *room.raw]
        for z, (matrix, width, out) in zip(raw, room.products, strict=False):
            torch.mm(z[:, :width].reshape(-1, len(matrix)), matrix, out=out)
        for z, norm in zip(raw, room.each_norm, strict=True):
            torch.linalg.vector_norm(z, dim=1, keepdim=True, out=norm)
        self._scales(room)
        for z, scale, level in zip(raw, room.each_norm, levels, strict=True):
            torch.mul(z, scale, out=level)


class SelectedUnits(Units):
    """Of the adaptive aggregator, of selected matrices `(d_l, d_{l-1})`, at best :func:`compressed`.

    Units lie *units-major*: `(U, n)` in memory, handed out as its `(n, U)` transpose. A level then is a block of rows,
    and every entry of a sparse matrix, norm and scale a long unit-stride loop; the matrix product that follows takes
    either layout at the same speed.
    """

    def __init__(self, matrices: list[Tensor], *, chain: str, normalize: bool):
        super().__init__(torch.ones(len(matrices)), chain=chain, normalize=normalize)
        self.matrices = matrices

    def empty(self, x: Tensor) -> Tensor:
        return x.new_empty(sum(self._dims(x)), len(x)).mT

    def _dims(self, x: Tensor) -> list[int]:
        return [x.shape[1], *map(len, self.matrices)]

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        return out.mT.split(self._dims(x))

    def _make_room(self, x: Tensor) -> SimpleNamespace:
        dims, n = self._dims(x), len(x)
        own, squares, norms = self._parts(x, [sum(dims), sum(dims[1:]), len(dims)])
        own = own.view(sum(dims), n).mT
        room = SimpleNamespace(own=own, levels=self._levels(own, x))
        self._set_norms(norms.view(len(dims), n), room)
        room.squares = squares.view(sum(dims[1:]), n).split(dims[1:])
        turned = math.gcd(x.shape[1], TURNED)
        room.identity = torch.eye(turned, dtype=x.dtype).expand(x.shape[1] // turned, turned, turned)
        return room

    def _make(self, x: Tensor, levels: Sequence[Tensor], room: SimpleNamespace) -> None:
        first, *later = room.each_norm
        torch.linalg.vector_norm(x, dim=1, out=first)
        count, turned, _ = room.identity.shape
        # Turned over by a product with ones, which takes half the time of a copy.
        parts = x.reshape(len(x), count, turned).permute(1, 2, 0)
        torch.bmm(room.identity, parts, out=levels[0].view(count, turned, len(x)))
        for matrix, z, level in zip(self.matrices, levels, levels[1:], strict=False):
            torch.addmm(level, matrix, z, beta=0, out=level)
        for level, squares, norm in zip(levels[1:], room.squares, later, strict=True):
            torch.sum(torch.square(level, out=squares), 0, out=norm)
        room.later_norms.sqrt_()
        self._scales(room)
        for level, scale in zip(levels, room.each_norm, strict=True):
            level.mul_(scale)


def compressed(matrix: Tensor) -> Tensor:
    """A selected matrix `(d_l, d_{l-1})` as its kept entries alone (CSR); the matrix itself if they are many."""
    if matrix.count_nonzero() > DENSE * matrix.numel():
        return matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls CSR tensors a beta feature, once a process
        return matrix.to_sparse_csr()


def aggregate(x: Tensor, units: Units) -> Tensor:
    """As :func:`esl_fast.reference.aggregate.aggregate` for `x (n, d)`, to keep."""
    out = units.empty(x)
    for start in range(0, len(x), BLOCK):
        units(x[start : start + BLOCK], out=out[start : start + BLOCK])
    return out


def spread(width: int) -> int:
    """How far apart rows of `width` entries begin best: an odd number of cache lines (of float32).

    At a power of two, a column falls into a few sets of the cache; off the lines, every vector written takes two.
    """
    return 32 * (width // 32) + 48
