"""Models: towers, heads, checkpoints."""

import importlib
from typing import Any

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
from esl_fast.model.region_word import RegionWordHead

# A head needs no towers: open_clip, slow to import, is imported with the first of these.
_WITH_TOWERS = {
    "CheckpointError": "checkpoint",
    "MatchingModel": "model",
    "ModelConfig": "model",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TOWERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_TOWERS[name]}"), name)


__all__ = [
    "REGION_WORD_SIMILARITIES", "SIMILARITIES", "CheckpointError", "CosineHead", "ESLHead", "Head", "MatchingModel",
    "ModelConfig", "NarrowedHead", "RegionWordHead", "load_checkpoint", "make_head", "save_checkpoint", "similarity",
]  # fmt: skip
