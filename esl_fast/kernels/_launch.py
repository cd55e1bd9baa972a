"""Launching a kernel that has been launched before: Triton takes the host longer to find it than to launch it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from esl_fast.kernels._common import INTERPRETING

# AMD's compiler looks at the size of tensors as well, and the interpreter compiles nothing.
REMEMBERING = not INTERPRETING and torch.version.hip is None
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple, constants: Mapping[str, Any]) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device; ``constants``: constexprs, then options."""
    known = specialization(arguments) if REMEMBERING else None
    if known is None:
        kernel[grid](*arguments, **constants)
        return
    key = id(kernel), driver.active.get_current_device(), *known, *constants.values()
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is not None:  # as it is where a hook keeps Triton from compiling
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    else:
        compiled, constexprs = found
        compiled[grid](*arguments, *constexprs)


def specialization(arguments: tuple) -> list | None:
    """All that a kernel is compiled for, and no less; None for arguments of other kinds than tensors and integers.

    That is the type, whether an address or a number is a multiple of 16, and whether a number is 1.
    """
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            found.append(argument & 15 if argument != 1 and -(1 << 31) <= argument < 1 << 31 else str(argument))
        elif kind is Tensor or kind is torch.nn.Parameter:
            found.append(argument.dtype)
            found.append(argument.data_ptr() & 15)
        else:
            return None
    return found
