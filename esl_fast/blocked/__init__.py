"""PyTorch made fast and memory-bounded: what runs on a CPU, and on a GPU what has no kernel."""

from esl_fast.blocked import (
    aggregate,
    contrastive,
    contribution,
    hinge,
    ranks,
    region_word,
    region_word_pairs,
    similarity,
    topk,
)

__all__ = [
    "aggregate", "contrastive", "contribution", "hinge", "ranks", "region_word", "region_word_pairs", "similarity",
    "topk",
]  # fmt: skip
