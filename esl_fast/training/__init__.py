"""Training: configuration, the loop, what a run leaves behind."""

from esl_fast.scripts import build_data
from esl_fast.training.build import build_model, seed_everything
from esl_fast.training.config import TrainConfig
from esl_fast.training.interrupt import Interrupted
from esl_fast.training.main import main
from esl_fast.training.trainer import Trainer

__all__ = [
    "Interrupted", "TrainConfig", "Trainer", "build_data", "build_model", "main", "seed_everything",
]  # fmt: skip
