"""PyTorch made fast and memory-bounded: what runs on a CPU."""

from esl_fast.blocked import aggregate, contribution, ranks

__all__ = ["aggregate", "contribution", "ranks"]
