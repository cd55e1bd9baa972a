"""Gradients that have none themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TWICE = b"this op of esl_fast can be differentiated once; esl_fast.reference holds definitions without that limit"


def first_order(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Let the `backward` of an autograd function raise where its results are differentiated.

    `once_differentiable` raises only where the incoming gradient depends on something; elsewhere its results pass for
    constants, though they depend on all that was saved.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        made = [result for result in results if isinstance(result, Tensor)]
        if not made:
            return results
        marked = torch._C._functions.DelayedError(TWICE, len(made))(*(x.detach().requires_grad_() for x in made))
        marked = iter((marked,) if isinstance(marked, Tensor) else marked)
        return tuple(next(marked) if isinstance(result, Tensor) else result for result in results)

    return run
