"""Keeping autocast out of what promises a precision."""

import functools
from collections.abc import Callable
from typing import Any

import torch

# Looked up at import: torch.compile cannot trace the question.
DEVICES = tuple(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


def without_autocast(op: Callable) -> Callable:
    """Let an op, or its backward, compute in the precision that it promises, whatever autocast would make of its parts.

    The dtype of the features decides: under autocast a tower hands out half precision, and the kernels take it.
    """

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)  # the others; torch.compile knows no stack of contexts
        return op(*args, **kwargs)

    return run
