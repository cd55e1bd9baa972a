"""Models: towers, heads, checkpoints."""

from esl_fast.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from esl_fast.model.heads import SIMILARITIES, CosineHead, ESLHead, Head, NarrowedHead, make_head, similarity
from esl_fast.model.model import MatchingModel, ModelConfig

__all__ = [
    "SIMILARITIES", "CheckpointError", "CosineHead", "ESLHead", "Head", "MatchingModel", "ModelConfig", "NarrowedHead",
    "load_checkpoint", "make_head", "save_checkpoint", "similarity",
]  # fmt: skip
