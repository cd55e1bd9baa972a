"""Evaluation: encode once, rank, report."""

from esl_fast.evaluation.metrics import chance_rsum, mean_metrics, ranks_from_similarity, recall_metrics
from esl_fast.evaluation.protocol import Encoder, SplitScores, evaluate
from esl_fast.evaluation.report import table

__all__ = [
    "Encoder", "SplitScores", "chance_rsum", "evaluate", "mean_metrics", "ranks_from_similarity", "recall_metrics",
    "table",
]  # fmt: skip
