"""Models: towers, heads, checkpoints."""

from esl_fast.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from esl_fast.model.heads import (
    REGION_WORD_SIMILARITIES,
    SIMILARITIES,
    CosineHead,
    ESLHead,
    Head,
    NarrowedHead,
    make_head,
    similarity,
)
from esl_fast.model.model import MatchingModel, ModelConfig
from esl_fast.model.region_word import RegionWordHead

__all__ = [
    "REGION_WORD_SIMILARITIES", "SIMILARITIES", "CheckpointError", "CosineHead", "ESLHead", "Head", "MatchingModel",
    "ModelConfig", "NarrowedHead", "RegionWordHead", "load_checkpoint", "make_head", "save_checkpoint", "similarity",
]  # fmt: skip
