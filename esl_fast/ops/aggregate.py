"""Measure-units of embeddings."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esl_fast import blocked, reference
from esl_fast._autocast import without_autocast
from esl_fast._eager import is_eager
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels
from esl_fast.ops.cache import WeightsCache
from esl_fast.reference.aggregate import CHAINS


@without_autocast
def aggregate(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    *,
    chain: str,
    normalize: bool = True,
    cache: WeightsCache | None = None,
) -> Tensor:
    """Units of every embedding: level 0 and the aggregated levels 1..L, concatenated.

    Args:
        x: embeddings ``(..., d)``, any float dtype, any leading sizes.
        weights: heuristic aggregator: filter taps ``(L, s)``; adaptive: one raw matrix ``(d_l, d_{l-1})`` a level,
            whose rows are normalised and keep their two largest entries.
        chain: what the next level reads, ``"normalized"`` units (image side) or ``"raw"`` vectors (text side).
        normalize: divide ``x`` by its norm first (global variant).
        cache: keeps what is made of unchanging adaptive weights between calls; with it large bfloat16 batches may be
            multiplied by composed maps on a GPU, which rounds differently (:mod:`esl_fast.kernels.composed`).

    Returns:
        ``(..., U)`` with ``U = sum_l d_l``, in the dtype of ``x``; summed in float32 or float64.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, or (CPU) a non-finite embedding.
    """
    checks.floating("x", x)
    checks.one_of("chain", chain, CHAINS)
    heuristic = isinstance(weights, Tensor)
    tensors = (weights,) if heuristic else tuple(weights)
    _check_levels(x, tensors, heuristic)
    for i, weight in enumerate(tensors):
        if weight.device != x.device:
            checks.same_device(x=x, **{f"weights[{i}]": weight})
    rows = x.reshape(-1, x.shape[-1])
    checks.finite("x", rows)
    options = {"chain": chain, "normalize": normalize}
    compute = torch.promote_types(x.dtype, torch.float32)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    if use_kernels(rows) and tensors:  # no matrix, no level: nothing for a kernel to do
        units = _aggregate_kernels(rows, weights, cache if not grad else None, **options)
    elif grad or rows.device.type != "cpu" or not is_eager():
        tensors = [w.to(compute) for w in tensors]
        levels = tensors[0].unbind() if heuristic else [reference.aggregate.select_top2(w) for w in tensors]
        units = reference.aggregate.aggregate(rows.to(compute), levels, **options).to(x.dtype)
    else:
        units = _units(weights, compute, cache, **options)
        units = blocked.aggregate.aggregate(rows.detach().to(compute), units).to(x.dtype)
    return units.view(*x.shape[:-1], units.shape[-1]) if x.ndim != 2 else units


def block_units(
    weights: Tensor | Sequence[Tensor],
    dtype: torch.dtype,
    *,
    chain: str,
    normalize: bool = True,
    cache: WeightsCache | None = None,
) -> Callable[[Tensor], Tensor]:
    """:func:`aggregate` for block after block of rows ``(n, d)`` of a dtype, on a CPU without gradients.

    Weights are looked at once, here; rows are not checked. Units last until the thread's next block is made.
    """
    compute = torch.promote_types(dtype, torch.float32)
    units = _units(weights, compute, cache, chain=chain, normalize=normalize)

    def of_block(rows: Tensor) -> Tensor:
        rows = rows.detach().to(compute)
        # What larger blocks need is not kept.
        made = units(rows) if len(rows) <= blocked.aggregate.BLOCK else blocked.aggregate.aggregate(rows, units)
        return made.to(dtype)

    return of_block


def _units(
    weights: Tensor | Sequence[Tensor], compute: torch.dtype, cache: WeightsCache | None, **options
) -> blocked.aggregate.Units:
    """What makes units in a dtype; with a cache, the same object until a weight changes."""

    def make(given: Sequence[Tensor]) -> blocked.aggregate.Units:
        given = [w.detach().to(compute) for w in given]
        if isinstance(weights, Tensor):
            return blocked.aggregate.FilteredUnits(given[0].unbind(), **options)
        return blocked.aggregate.SelectedUnits(list(map(reference.aggregate.select_top2, given)), **options)

    given = (weights,) if isinstance(weights, Tensor) else weights
    return make(given) if cache is None else cache.get(f"units {compute} {options}", given, make)


def _check_levels(x: Tensor, weights: Sequence[Tensor], heuristic: bool) -> None:
    for weight in weights:
        checks.floating("weights", weight)
    if x.ndim == 0:
        raise ValueError("x is a scalar; expected (..., d)")
    d = x.shape[-1]
    if heuristic:
        taps = weights[0]
        if taps.ndim != 2 or taps.shape[1] < 1 or (taps.shape[0] and d // taps.shape[1] ** taps.shape[0] < 1):
            raise ValueError(f"weights has shape {tuple(taps.shape)}; expected taps (L, s) with {d} // s**L >= 1")
        return
    for level, weight in enumerate(weights, start=1):
        if weight.ndim != 2 or weight.shape[1] != d or weight.shape[0] < 1:
            raise ValueError(f"level {level} has a matrix of shape {tuple(weight.shape)}; expected (d_{level}, {d})")
        d = weight.shape[0]


def _aggregate_kernels(
    rows: Tensor, weights: Tensor | Sequence[Tensor], cache: WeightsCache | None, **options
) -> Tensor:
    from esl_fast.kernels import aggregate as kernel  # Triton is imported only where it is used
    from esl_fast.kernels import composed
    from esl_fast.kernels.select import adaptive_dims, select

    if isinstance(weights, Tensor):
        return kernel.aggregate_heuristic(rows, weights, **options)
    if cache is None:
        return kernel.aggregate_adaptive(rows, weights, select(weights), **options)
    if composed.serves(rows, weights):

        def make(given: Sequence[Tensor]) -> composed.Maps:
            # While a graph is captured this gathers, and may not load the kernel for it.
            kernel.aggregate_adaptive(rows[:1], given, select(given), **options)
            return composed.compose(given)

        # Composing takes longer than it saves a single call.
        maps = cache.get("composed", weights, make, lambda _: None)
        if maps is not None:
            return composed.aggregate_composed(rows, maps, list(adaptive_dims(weights)), **options)
    return kernel.aggregate_adaptive(rows, weights, cache.get("selection", weights, select), **options)
