"""What every launcher needs."""

import contextlib
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
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(x)


PADDING = 64  # rows of what the kernels allocate hold a multiple of this


def padded_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ``(n, width)`` in rows padded to a multiple of 64 elements: base and rows are aligned for TMA."""
    stride = (width + PADDING - 1) // PADDING * PADDING
    # Not a slice: autograd lets nobody write to a view that an op made.
    return torch.empty((n, stride), dtype=dtype, device=device).as_strided_((n, width), (stride, 1))
