"""The definition of every op in plain PyTorch: what everything else is held to."""

from esl_fast.reference import aggregate, contrastive, contribution, hinge, ranks, region_word, similarity, topk

__all__ = ["aggregate", "contrastive", "contribution", "hinge", "ranks", "region_word", "similarity", "topk"]
