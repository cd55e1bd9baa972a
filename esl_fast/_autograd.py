"""Gradients that have none themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def apart(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors for an autograd function, of which torch.compile takes none twice."""
    if not torch.compiler.is_compiling():
        return tensors
    seen = [any(x is before for before in tensors[:i]) for i, x in enumerate(tensors)]
    return tuple(x.view_as(x) if again and x is not None else x for x, again in zip(tensors, seen, strict=True))


class _Once(torch.autograd.Function):
    """Copies of the first ``count`` tensors, which depend on all of them and cannot be differentiated."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "this op of esl_fast can be differentiated once; esl_fast.reference holds definitions without that limit"
        )


class _Saved:
    """A context whose saved tensors have been asked for; some can be asked for only once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Let the `backward` of an autograd function raise where its results are differentiated.

    `once_differentiable` raises only where the incoming gradient depends on something; elsewhere its results pass for
    constants, though they depend on all that was saved.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Saved(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        made = [result for result in results if isinstance(result, Tensor)]
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        copies = iter(_Once.apply(len(made), *made, *sources))
        return tuple(next(copies) if isinstance(result, Tensor) else result for result in results)

    return run
