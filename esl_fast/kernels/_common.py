"""What every launcher needs."""

import os

import torch
from torch import Tensor

# `@triton.jit` decides at import whether kernels are interpreted; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def runs_here(x: Tensor) -> bool:
    """Whether a kernel can run on the device of ``x``: a GPU, or any device under the interpreter."""
    return x.is_cuda or INTERPRETING


def on_device_of(x: Tensor):
    """Context in which kernels launch on the device (and its current stream) that holds ``x``."""
    return torch.cuda.device_of(x)
