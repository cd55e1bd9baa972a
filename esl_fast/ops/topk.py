"""Best matches of each query."""

import torch
from torch import Tensor

from esl_fast import blocked
from esl_fast._autocast import without_autocast
from esl_fast.ops import checks
from esl_fast.ops.backend import use_kernels

MOST = 1024  # that the kernel keeps of a query; they lie in registers


@torch.no_grad()
@without_autocast
def topk(query_units: Tensor, gallery_units: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices of the ``k`` best gallery items of each query, best first, without the matrix.

    Args:
        query_units: ``(Q, U)``.
        gallery_units: ``(G, U)``, one side folded; may lie on the CPU (pinned or memory-mapped) while the queries are
            on a GPU, it is then streamed.
        k: how many; all of them if the gallery is smaller.

    Returns:
        scores ``(Q, min(k, G))`` in float32 (or float64) and indices, int64, descending; of equal scores the lower
        index comes first, NaN counts as -inf.

    Raises:
        TypeError, ValueError: wrong types or shapes; a k that is no positive integer.
    """
    checks.matrix("query_units", query_units)
    checks.matrix("gallery_units", gallery_units, query_units.shape[1])
    k = min(checks.count_of("k", k), gallery_units.shape[0])
    if use_kernels(query_units) and 0 < k <= MOST and gallery_units.dtype != torch.float64:
        from esl_fast.kernels import topk as kernel  # Triton is imported only where it is used

        search = kernel.topk if gallery_units.device == query_units.device else kernel.topk_stream
        return search(query_units.to(torch.promote_types(query_units.dtype, gallery_units.dtype)), gallery_units, k)
    return blocked.topk.topk(query_units, gallery_units, k)
