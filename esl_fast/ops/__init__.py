"""Public ops: checks, choice of backend, one name each."""

from esl_fast.ops import checks
from esl_fast.ops.aggregate import SelectionCache, aggregate
from esl_fast.ops.backend import use_backend
from esl_fast.ops.contrastive import contrastive_loss
from esl_fast.ops.contribution import degrees, fold
from esl_fast.ops.ranks import retrieval_ranks
from esl_fast.ops.similarity import similarity
from esl_fast.ops.topk import topk

__all__ = [
    "SelectionCache", "aggregate", "checks", "contrastive_loss", "degrees", "fold", "retrieval_ranks", "similarity",
    "topk", "use_backend",
]  # fmt: skip
