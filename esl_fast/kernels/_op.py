"""Ops registered with `torch.library` that eager code calls without the dispatcher.

What `torch.library.custom_op` does around every call, and again around its autograd formula, takes some 0.4 ms of the
host, more than all kernels of a small batch take of the GPU. A plain eager call needs none of it: there the op is an
ordinary function, or an ordinary `torch.autograd.Function` where a gradient is wanted. Under `torch.compile`, with
dispatch modes or tensor subclasses the registered op is what is called.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from esl_fast._autocast import without_autocast
from esl_fast._autograd import first_order
from esl_fast._eager import is_eager
from esl_fast.kernels._common import INTERPRETING

DEVICES = ("cuda", "cpu") if INTERPRETING else "cuda"
PLAIN = (Tensor, torch.nn.Parameter)


class Op:
    """A kernel's op; made by :func:`op`. ``registered`` is what the dispatcher knows, ``run`` the bare function."""

    setup_context: Callable
    backward: Callable

    def __init__(self, name: str, run: Callable, mutates: Sequence[str]) -> None:
        self._custom = torch.library.custom_op(f"esl_fast::{name}", run, mutates_args=mutates, device_types=DEVICES)
        self.run = run
        self._defaults = tuple(parameter.default for parameter in inspect.signature(run).parameters.values())
        self._function: type[torch.autograd.Function] | None = None
        self.registered = getattr(torch.ops.esl_fast, name).default

    def register_fake(self, fake: Callable) -> Callable:
        return self._custom.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable, twice: bool = False) -> None:
        """As `torch.library.register_autograd`; ``twice``: ``backward`` is differentiable itself."""
        backward = without_autocast(backward)
        self.setup_context, self.backward = setup_context, backward
        self._custom.register_autograd(backward, setup_context=setup_context)
        self._function = _make_function(self.run, backward, setup_context, twice)

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self.registered(*args)
        args += self._defaults[len(args) :]
        lists = gradient = False
        for arg in args:
            kind = type(arg)
            if kind is list or kind is tuple:
                lists = True
                for x in arg:
                    if type(x) in PLAIN:
                        gradient = gradient or x.requires_grad
                    elif isinstance(x, Tensor):
                        return self.registered(*args)
            elif kind in PLAIN:
                gradient = gradient or arg.requires_grad
            elif isinstance(arg, Tensor):
                return self.registered(*args)
        if not (gradient and torch.is_grad_enabled()):
            return self.run(*args)
        if self._function is None:
            with torch.no_grad():
                return self.run(*args)
        if not lists:
            return self._function.apply(None, *args)
        lengths = tuple(len(arg) if type(arg) in (list, tuple) and _has_tensors(arg) else -1 for arg in args)
        return self._function.apply(
            lengths, *(x for arg, n in zip(args, lengths, strict=True) for x in (arg if n >= 0 else (arg,)))
        )


def op(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable], Op]:
    """Make a function that launches kernels an op ``esl_fast::<name>``. It takes its arguments by position."""
    return lambda run: Op(name, run, mutates)


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but eager code will see what is done with these tensors."""
    return is_eager() and all(type(x) in PLAIN for x in tensors)


def _make_function(run: Callable, backward: Callable, setup: Callable, twice: bool) -> type[torch.autograd.Function]:
    """``apply(lengths, *flat)``: autograd sees tensors in a list only where the list is spread out."""

    def forward(ctx, lengths: tuple[int, ...] | None, *flat: Any) -> Any:
        args = flat if lengths is None else gather(flat, lengths)
        output = run(*args)
        ctx.lengths = lengths
        setup(ctx, args, output)
        return output

    def differentiate(ctx, *grads: Tensor) -> tuple:
        needed = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = needed[1:] if ctx.lengths is None else gather(needed[1:], ctx.lengths)
            results = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        if ctx.lengths is None:
            return None, *results
        spread = (
            (result,) if n < 0 else result if result is not None else (None,) * n
            for result, n in zip(results, ctx.lengths, strict=True)
        )
        return None, *(x for part in spread for x in part)

    differentiate = differentiate if twice else first_order(differentiate)
    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type("EslFastBackward", (torch.autograd.Function,), members)


class Step:
    """An op's call inside of an autograd function that makes several: what the op takes for its ``ctx``."""

    saved_tensors: tuple[Tensor, ...]

    def __init__(self, op: Op, *args: Any) -> None:
        self.op = op
        self.output = op.run(*args)
        op.setup_context(self, args, self.output)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def backward(self, saved: tuple[Tensor, ...], grad: Tensor) -> tuple:
        self.saved_tensors = saved
        try:
            return self.op.backward(self, grad)
        finally:
            del self.saved_tensors


def save_steps(ctx: Any, steps: Sequence[Step]) -> None:
    """Leave steps in ``ctx``, and with autograd what they have saved."""
    ctx.save_for_backward(*(tensor for step in steps for tensor in step.saved_tensors))
    ctx.steps = [(step, len(step.saved_tensors)) for step in steps]
    for step in steps:
        del step.saved_tensors, step.output


def backwards(ctx: Any) -> list[Callable[[Tensor], tuple]]:
    """What turns the gradient of each step's output into those of its arguments."""
    tensors = iter(ctx.saved_tensors)
    return [partial(step.backward, tuple(islice(tensors, count))) for step, count in ctx.steps]


def _has_tensors(arg: Sequence[Any]) -> bool:
    return bool(arg) and isinstance(arg[0], Tensor)


def gather(flat: Sequence[Any], lengths: Sequence[int]) -> tuple:
    args, position = [], 0
    for n in lengths:
        args.append(flat[position] if n < 0 else list(flat[position : position + n]))
        position += abs(n)
    return tuple(args)
