"""Launching a kernel that has been launched before: Triton takes the host longer to find it than to launch it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from esl_fast.kernels._common import INTERPRETING, OPTIONS

# AMD's compiler looks at the size of tensors as well, and the interpreter compiles nothing.
REMEMBERING = not INTERPRETING and torch.version.hip is None
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple, constants: Mapping[str, Any]) -> None:
    """``kernel[grid](*arguments, **constants)`` with :data:`OPTIONS`, on the current device; ``constants``: constexprs
    and ``num_warps``, ``num_stages``."""
    known = specialization(arguments, _looked_at(kernel)) if REMEMBERING else None
    if known is None:
        kernel[grid](*arguments, **constants, **OPTIONS)
        return
    key = id(kernel), driver.active.get_current_device(), *known, *constants.values()
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, **OPTIONS)
        if compiled is not None:  # as it is where a hook keeps Triton from compiling
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    else:
        compiled, constexprs = found
        compiled[grid](*arguments, *constexprs)


_parameters: dict[int, list[tuple[bool, bool]]] = {}


def _looked_at(kernel: Any) -> list[tuple[bool, bool]]:
    """Of each parameter, whether its value and its alignment count."""
    found = _parameters.get(id(kernel))
    if found is None:
        found = [(not p.do_not_specialize, not p.do_not_specialize_on_alignment) for p in kernel.params]
        _parameters[id(kernel)] = found
    return found


def specialization(arguments: tuple, looked_at: Sequence[tuple[bool, bool]]) -> list | None:
    """All that a kernel is compiled for, and no less; None for arguments of other kinds than tensors and integers.

    That is the type and, where ``looked_at`` says so (value, alignment), whether a number is 1 and whether an address
    or a number is a multiple of 16.
    """
    found: list[Any] = []
    for argument, (value, alignment) in zip(arguments, looked_at, strict=False):
        kind = type(argument)
        if kind is int:
            if not -(1 << 31) <= argument < 1 << 31:
                found.append(str(argument))
            elif not value:
                found.append(0)
            else:
                found.append("1" if argument == 1 else argument & 15 if alignment else 0)
        elif kind is Tensor or kind is torch.nn.Parameter:
            found.append(argument.dtype)
            found.append(argument.data_ptr() & 15 if value and alignment else 0)
        elif argument is None:
            found.append(None)
        else:
            return None
    return found
