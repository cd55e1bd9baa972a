"""Parameter groups and the learning rate's course."""

import math

import torch
from torch import nn

from esl_fast.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one learning rate for the towers (and the temperature), one for the head, one for a BERT."""
    rates = {"": "lr", "head.": "head_lr", "text_tower.bert.": "bert_lr"}
    groups = {prefix: {"params": [], "name": name, "peak_lr": getattr(config, name)} for prefix, name in rates.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = max((prefix for prefix in rates if name.startswith(prefix)), key=len)
            groups[prefix]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups.values() if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.wd,
        fused=True,
    )


def lr_factor(step: int, total: int, warmup: float, decay_step: int | None = None) -> float:
    """Share of the peak learning rate at ``step`` of ``total``.

    A linear rise, then half a cosine to 0 or, with ``decay_step``, the peak until there and a tenth of it from there.
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    if decay_step is not None:
        return 1.0 if step < decay_step else 0.1
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
