"""esl_fast: Enhanced Semantic Similarity Learning for image-text matching."""

from typing import Any

from esl_fast import model
from esl_fast.model import ESLHead, RegionWordHead, similarity
from esl_fast.ops import (
    contrastive_loss,
    hinge_loss,
    region_word_hinge_loss,
    region_word_ranks,
    region_word_rerank,
    region_word_similarity,
    region_word_topk,
    retrieval_ranks,
    topk,
    use_backend,
)

__version__ = "0.1.0"
__all__ = [
    "ESLHead", "RegionWordHead", "contrastive_loss", "hinge_loss", "load_checkpoint", "region_word_hinge_loss",
    "region_word_ranks", "region_word_rerank", "region_word_similarity", "region_word_topk", "retrieval_ranks",
    "save_checkpoint", "similarity", "topk", "use_backend",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(model, name)  # what needs open_clip, imported when it is asked for
