"""Parameter groups and the learning rate's course."""

import math

import torch
from torch import nn

from esl_fast.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one learning rate for the towers (and the temperature), one for the head."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not name.startswith("head.")], "peak_lr": config.lr},
        {"params": [p for name, p in trained if name.startswith("head.")], "peak_lr": config.head_lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.wd,
        fused=True,
    )


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: a linear rise, then half a cosine to 0."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
