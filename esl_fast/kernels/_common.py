"""What every launcher needs."""

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# `@triton.jit` decides at import whether kernels are interpreted; so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Of every compilation: products may be fused into sums, which Triton's default will stop doing.
OPTIONS = {"enable_fp_fusion": True}


def runs_here(x: Tensor) -> bool:
    """Whether a kernel can run on the device of ``x``: a GPU, or any device under the interpreter."""
    return x.is_cuda or INTERPRETING


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor):
    """Context in which kernels launch on the device (and its current stream) that holds ``x``."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


def exact_float32() -> bool:
    """Whether float32 is multiplied as float32: PyTorch was not allowed TF32, by its older switch or by its newer."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # what the older one says once the newer was used
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


# As `triton.cdiv` and `triton.next_power_of_2`, which take the host several microseconds a call.


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def matrices_of(flat: Tensor, shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The matrices that lie one after another in ``flat``."""
    parts = flat.split_with_sizes([rows * columns for rows, columns in shapes])
    matrices = [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]
    return [m if m.dtype == dtype else m.to(dtype) for m, dtype in zip(matrices, dtypes, strict=True)]


PADDING = 64  # rows of what the kernels allocate hold a multiple of this


def padded_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty ``(n, width)`` in rows padded to a multiple of 64 elements: base and rows are aligned for TMA."""
    stride = cdiv(width, PADDING) * PADDING
    # Not a slice: autograd lets nobody write to a view that an op made.
    return torch.empty((n, stride), dtype=dtype, device=device).as_strided_((n, width), (stride, 1))


def widened(x: Tensor) -> Tensor:
    """``x (n, width)`` with what lies between its rows, where that completes them to a multiple of 8 elements; else x.

    cuBLAS multiplies by such a matrix almost three times faster. Columns from ``width`` on hold anything: for an outer
    dimension of a product only, whose result is cut back.
    """
    if type(x) is not Tensor:  # traced
        return x
    stride, width = x.stride(0), x.shape[1]
    if width % 8 == 0 or x.stride(1) != 1 or stride % 8 or not width < stride < width + PADDING:
        return x
    if x.storage_offset() + x.shape[0] * stride > x.untyped_storage().nbytes() // x.element_size():
        return x
    return x.as_strided((x.shape[0], stride), (stride, 1))
