"""The definition of every op in plain PyTorch: what everything else is held to."""

from esl_fast.reference import aggregate, contribution, ranks, similarity

__all__ = ["aggregate", "contribution", "ranks", "similarity"]
