"""Public ops: checks, choice of backend, one name each; and what heads alone call, to make of two ops one step."""

from esl_fast.ops import checks
from esl_fast.ops.aggregate import aggregate, block_units
from esl_fast.ops.backend import use_backend
from esl_fast.ops.cache import WeightsCache
from esl_fast.ops.contrastive import contrastive_loss
from esl_fast.ops.contribution import degrees, fold
from esl_fast.ops.hinge import hinge_loss, region_word_hinge_loss
from esl_fast.ops.ranks import retrieval_ranks
from esl_fast.ops.region_word import pack_captions, region_word_similarity
from esl_fast.ops.region_word_retrieval import (
    region_word_ranks,
    region_word_rerank,
    region_word_topk,
    rerank,
    rerank_ranks,
)
from esl_fast.ops.sides import in_one_step, sides
from esl_fast.ops.similarity import similarity, streamed_similarity, streams
from esl_fast.ops.topk import topk

__all__ = [
    "WeightsCache", "aggregate", "block_units", "checks", "contrastive_loss", "degrees", "fold", "hinge_loss",
    "in_one_step", "pack_captions", "region_word_hinge_loss", "region_word_ranks", "region_word_rerank",
    "region_word_similarity", "region_word_topk", "rerank", "rerank_ranks", "retrieval_ranks", "sides", "similarity",
    "streamed_similarity", "streams", "topk", "use_backend",
]  # fmt: skip
