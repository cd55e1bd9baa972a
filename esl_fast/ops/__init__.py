"""Public ops: checks, choice of backend, one name each."""

from esl_fast.ops import checks
from esl_fast.ops.aggregate import SelectionCache, aggregate
from esl_fast.ops.backend import use_backend
from esl_fast.ops.contribution import degrees, fold
from esl_fast.ops.ranks import retrieval_ranks
from esl_fast.ops.similarity import similarity

__all__ = ["SelectionCache", "aggregate", "checks", "degrees", "fold", "retrieval_ranks", "similarity", "use_backend"]
