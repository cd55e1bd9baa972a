"""Whether a call is carried out as it stands."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a dual level is at work, which sees PyTorch's operations alone.

    Of a registered op, it would take the tangent for 0.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_eager() -> bool:
    """Whether no compiler, tracer, transform of `torch.func`, dispatch mode or dual level stands between a call and its
    doing.

    Where one does, values cannot be read, results cannot be written with `out=`, and a tensor may not be what it seems.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
    )


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting`, which PyTorch 2.11 also answers with True while it compiles."""
    return torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)
