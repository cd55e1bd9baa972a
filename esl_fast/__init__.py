"""esl_fast: Enhanced Semantic Similarity Learning for image-text matching, as fast as the hardware allows."""

from esl_fast.model import ESLHead, RegionWordHead, load_checkpoint, save_checkpoint, similarity
from esl_fast.ops import contrastive_loss, retrieval_ranks, topk, use_backend

__version__ = "0.1.0"
__all__ = [
    "ESLHead", "RegionWordHead", "contrastive_loss", "load_checkpoint", "retrieval_ranks", "save_checkpoint",
    "similarity", "topk", "use_backend",
]  # fmt: skip
