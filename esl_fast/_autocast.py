"""Keeping autocast out of what promises a precision."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Looked up at import: torch.compile cannot trace the question.
DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


def without_autocast(op: Callable) -> Callable:
    """Let an op, or its backward, compute in the precision that it promises, whatever autocast would make of its parts.

    The dtype of the features decides: under autocast a tower hands out half precision, and the kernels take it.
    """

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = "cpu"
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor):
                device = argument.device.type
                break
        if device not in DEVICES or not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run
