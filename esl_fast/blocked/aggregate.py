"""Measure-units on a CPU without gradients, block by block of embeddings.

Both aggregators make every level of its predecessor's raw vectors, and divide all of them at the end, by what the
definition divides by (see :class:`Scales`).
"""

import math
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esl_fast import reference
from esl_fast.reference.aggregate import EPS, level_dims

# Vectors handled at a time.
BLOCK = 2048
# Windows of a filter that one row of a product covers.
WINDOWS = 8
# Entries of an embedding that one product turns over.
TURNED = 32
# Shapes of blocks whose views are kept.
SHAPES = 4
# Share of kept entries beyond which a dense product is faster: rows of fewer than 40 entries, and many ties.
DENSE = 1 / 20


class Scales:
    """Norms of levels' raw vectors, which become what the vectors are multiplied by to be units.

    ``u_k = A_k u_{k-1} / (||A_k u_{k-1}|| + eps)``, of ``u_{k-1} = z_{k-1} / n_{k-1}``, is ``z_k / n_k`` of the raw
    ``z_k = A_k z_{k-1}``, with ``n_k = ||z_k|| + eps n_{k-1}``; where only z_0 is normalised, ``||z_k|| + eps n_0``.
    """

    def __init__(self, norms: Tensor, sizes: Tensor, chained: bool, normalize: bool):
        """`norms (L+1, ...)`, to be filled; `sizes (L,)`: how many times too small A_k is taken."""
        self.all, self.each, self.later = norms, norms.unbind(), norms[1:]
        self.chained, self.normalize = chained, normalize
        # Zeros must stay zeros: n_k is at least this part of n_0.
        limits = torch.finfo(norms.dtype)
        self.floor = math.sqrt(limits.tiny)
        self.most = math.sqrt(limits.eps / limits.tiny)
        eps = EPS / (sizes if chained else sizes.cumprod(0))
        eps = eps.clamp(0 if chained else self.floor, 1e30).to(norms.dtype)
        self.eps = eps.view(-1, *[1] * (norms.ndim - 1))
        self.each_eps = self.eps.unbind()

    def finish(self) -> None:
        first = self.each[0]
        if not self.normalize:
            first.fill_(1)
        if self.chained:
            for (previous, norm), eps in zip(pairwise(self.each), self.each_eps, strict=True):
                norm.addcmul_(previous, eps)
            self.later.add_(first, alpha=self.floor)
        else:
            self.later.addcmul_(first, self.eps)
        self.all.reciprocal_()

    def lost(self) -> Tensor | None:
        """Which vectors have a level too small for its norm to be right; None if all are well."""
        if not self.all.numel() or not self.all.amax().item() > self.most:
            return None
        return (self.all.flatten(1) > self.most).any(0).nonzero().squeeze(1)


class Kept(threading.local):
    """Memory of one thread, and views of it by the shape of the embeddings they serve."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.views: dict[torch.Size, Any] = {}

    def parts(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Memory for so many entries an embedding of `x`, each flat."""
        sizes = [len(x) * width for width in widths]
        if self.memory is None or sum(sizes) > len(self.memory):
            self.views.clear()
            self.memory = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
        return list(self.memory[: sum(sizes)].split(sizes))


class Units:
    """What makes units of embeddings `x (n, d)`, float32 or float64.

    Where memory is taken anew for every block, and views of it are made, both are paid for: new memory page by page,
    views by finding the caches cold after a matrix product. So a thread keeps them for its next block, and what a call
    returns lasts until then, unless it is written to `out`, which :meth:`empty` makes.
    """

    def __init__(self, matrices: Sequence[Tensor], *, chain: str, normalize: bool):
        """`matrices[k]`: taps or a matrix of level k + 1. They are kept at a size of about 1."""
        sizes = [_power_of_2(matrix) for matrix in matrices]
        self.matrices = [matrix / size for matrix, size in zip(matrices, sizes, strict=True)]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device="cpu")
        self.chained, self.normalize = chain == "normalized", normalize
        self.define = partial(reference.aggregate.aggregate, weights=matrices, chain=chain, normalize=normalize)
        self.kept = Kept()

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        views = self.kept.views.get(x.shape)
        if views is None:
            with torch.inference_mode(False), torch.no_grad():  # written in this mode and out of it
                views = self._views(x)
            if len(self.kept.views) == SHAPES:
                self.kept.views.clear()
            self.kept.views[x.shape] = views
        self._make(x, views.levels if out is None else self._levels(out, x), views)
        out = views.out if out is None else out
        lost = views.scales.lost()
        if lost is not None:
            lost = lost[x[lost].any(1)]  # of zeros nothing can be lost
            out[lost] = self.define(x[lost])
        return out

    def empty(self, x: Tensor) -> Tensor:
        """`(n, U)`, uninitialised."""
        raise NotImplementedError

    def _dims(self, x: Tensor) -> list[int]:
        """Sizes of levels 0 to L."""
        raise NotImplementedError

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        """Levels of `out (n, U)`, as :meth:`_make` takes them."""
        raise NotImplementedError

    def _views(self, x: Tensor) -> Any:
        """What :meth:`_make` works on; its `out (n, U)` has the levels `levels`."""
        raise NotImplementedError

    def _make(self, x: Tensor, levels: Sequence[Tensor], views: Any) -> None:
        raise NotImplementedError

    def _scales(self, norms: Tensor) -> Scales:
        return Scales(norms, self.sizes, self.chained, self.normalize)


def _power_of_2(matrix: Tensor) -> float:
    """About the size of the largest entry; 1 of what is 0 or not finite."""
    largest = matrix.abs().max().item() if matrix.numel() else 0.0
    return math.ldexp(1, min(max(math.frexp(largest)[1], -100), 100)) if math.isfinite(largest) else 1.0


class FilteredViews(NamedTuple):
    out: Tensor
    levels: Sequence[Tensor]
    raw: list[Tensor]  # (n, d_l) of levels 1 to L
    products: list[tuple]  # of the same: what :meth:`FilteredUnits._make` multiplies
    scales: Scales  # (L+1, n, 1)


class FilteredUnits(Units):
    """Of the heuristic aggregator's taps, `(s,)` a level. Units lie row by row.

    A level is a skinny product: a few windows at a time, times a block-diagonal matrix of taps.
    """

    def empty(self, x: Tensor) -> Tensor:
        return spread_rows(x, sum(self._dims(x)))

    def _dims(self, x: Tensor) -> list[int]:
        return level_dims(x.shape[1], len(self.matrices[0]) if self.matrices else 1, len(self.matrices))

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        return out.split(self._dims(x), 1)

    def _views(self, x: Tensor) -> FilteredViews:
        dims, n = self._dims(x), len(x)
        out, *raw, norms = self.kept.parts(x, [spread(sum(dims)), *dims[1:], len(dims)])
        out = out.view(n, spread(sum(dims)))[:, : sum(dims)]
        raw = [z.view(n, d) for z, d in zip(raw, dims[1:], strict=True)]
        diagonal = torch.eye(WINDOWS, dtype=x.dtype, device=x.device)
        products = []
        for taps, z, level in zip(self.matrices, [None, *raw], raw, strict=False):
            d = level.shape[1]
            windows = max(w for w in range(1, WINDOWS + 1) if d % w == 0)
            matrix = torch.kron(diagonal[:windows, :windows], taps[:, None])  # (s * windows, windows)
            covered = d * taps.shape[0]  # a last incomplete window is dropped
            known = z.view(-1, matrix.shape[0]) if z is not None and z.shape[1] == covered else None
            products.append((known, covered, matrix, level.view(n * d // windows, windows)))
        scales = self._scales(norms.view(len(dims), n, 1))
        return FilteredViews(out, self._levels(out, x), raw, products, scales)

    def _make(self, x: Tensor, levels: Sequence[Tensor], views: FilteredViews) -> None:
        raw, scales = [x, *views.raw], views.scales
        for z, (known, covered, matrix, product) in zip(raw, views.products, strict=False):
            read = z[:, :covered].reshape(-1, matrix.shape[0]) if known is None else known
            torch.mm(read, matrix, out=product)
        for z, norm in zip(raw, scales.each, strict=True):
            torch.linalg.vector_norm(z, dim=1, keepdim=True, out=norm)
        scales.finish()
        for z, scale, level in zip(raw, scales.each, levels, strict=True):
            torch.mul(z, scale, out=level)


class SelectedViews(NamedTuple):
    out: Tensor
    levels: Sequence[Tensor]  # (d_l, n) of levels 0 to L
    squares: Sequence[Tensor]  # (d_l, n) of levels 1 to L
    identity: Tensor  # (d / turned, turned, turned)
    scales: Scales  # (L+1, n)


class SelectedUnits(Units):
    """Of the adaptive aggregator's selected matrices, `(d_l, d_{l-1})`.

    Units lie *units-major*: `(U, n)` in memory, handed out as its `(n, U)` transpose. A level then is a block of rows,
    and every entry of a sparse matrix, norm and scale a long unit-stride loop; the matrix product that follows takes
    either layout at the same speed.
    """

    def __init__(self, matrices: Sequence[Tensor], **options: Any):
        super().__init__(matrices, **options)
        self.matrices = [compressed(matrix) for matrix in self.matrices]

    def empty(self, x: Tensor) -> Tensor:
        return x.new_empty(sum(self._dims(x)), len(x)).mT

    def _dims(self, x: Tensor) -> list[int]:
        return [x.shape[1], *map(len, self.matrices)]

    def _levels(self, out: Tensor, x: Tensor) -> Sequence[Tensor]:
        return out.mT.split(self._dims(x))

    def _views(self, x: Tensor) -> SelectedViews:
        dims, n = self._dims(x), len(x)
        out, squares, norms = self.kept.parts(x, [sum(dims), sum(dims[1:]), len(dims)])
        out = out.view(sum(dims), n).mT
        squares = squares.view(sum(dims[1:]), n).split(dims[1:])
        turned = math.gcd(x.shape[1], TURNED)
        identity = torch.eye(turned, dtype=x.dtype, device=x.device).expand(x.shape[1] // turned, turned, turned)
        return SelectedViews(out, self._levels(out, x), squares, identity, self._scales(norms.view(len(dims), n)))

    def _make(self, x: Tensor, levels: Sequence[Tensor], views: SelectedViews) -> None:
        first, *later = views.scales.each
        torch.linalg.vector_norm(x, dim=1, out=first)
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            levels[0].copy_(x.mT)
        else:  # turned over by a product with ones, which takes half the time
            count, turned, _ = views.identity.shape
            n = x.shape[0]
            parts = x.reshape(n, count, turned).permute(1, 2, 0)
            torch.bmm(views.identity, parts, out=levels[0].view(count, turned, n))
        for matrix, z, level in zip(self.matrices, levels, levels[1:], strict=False):
            torch.addmm(level, matrix, z, beta=0, out=level)
        for level, squares, norm in zip(levels[1:], views.squares, later, strict=True):
            torch.sum(torch.square(level, out=squares), 0, out=norm)
        views.scales.later.sqrt_()
        views.scales.finish()
        for level, scale in zip(levels, views.scales.each, strict=True):
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


def spread_rows(x: Tensor, width: int) -> Tensor:
    """Room for `width` entries for each row of `x`, spread."""
    return x.new_empty(len(x), spread(width))[:, :width]
