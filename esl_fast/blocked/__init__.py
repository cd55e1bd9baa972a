"""PyTorch made fast and memory-bounded: what runs on a CPU."""

from esl_fast.blocked import aggregate, contrastive, contribution, ranks, topk

__all__ = ["aggregate", "contrastive", "contribution", "ranks", "topk"]
