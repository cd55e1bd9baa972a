"""What is made of weights, kept for as long as they stay what they are."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# Steps of optimizers that each weight in a cache has been through: a fused one changes weights without raising their
# versions.
_steps: dict[int, int] = {}


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _steps and not torch.compiler.is_compiling():
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            if id(weight) in _steps:
                _steps[id(weight)] += 1


_hook = register_optimizer_step_post_hook(_count)


def _steps_of(weight: Tensor) -> int:
    if id(weight) not in _steps:
        _steps[id(weight)] = 0
        weakref.finalize(weight, _steps.pop, id(weight), None)
    return _steps[id(weight)]


class WeightsCache:
    """Keeps what was made of weights, one thing a kind, until one of them is replaced or changes in place.

    A change shows in the weight's version, or follows an optimizer's step. One that does neither (``weight.data``, a
    replayed CUDA graph, FSDP's gathering) is seen on a CPU, where the values are compared as well; on a GPU that would
    need a synchronisation, and :meth:`clear` is the caller's. Each stream of a GPU has its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple] = {}

    def clear(self) -> None:
        self.__init__()

    def __reduce__(self) -> tuple:
        return type(self), ()  # a copy makes all anew: compressed matrices cannot be copied

    def get(self, kind: str, weights: Sequence[Tensor], make: Callable, make_once: Callable | None = None) -> Any:
        """What ``make(weights)`` has made; of weights that cannot be watched, what ``make_once(weights)`` makes now."""
        if any(w.is_inference() for w in weights):  # these carry no version to compare
            return (make_once or make)(weights)
        stream = None
        if weights and weights[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return (make_once or make)(weights)  # at replay, from the weights of that time
            stream = torch.cuda.current_stream(weights[0].device).cuda_stream
        key = [(w.data_ptr(), w._version, w.dtype, _steps_of(w)) for w in weights]
        name = kind, len(weights), stream
        known, found, values, made = self._kept.get(name, ((), None, (), None))
        # An address may serve another tensor later: identity says that it is this one.
        same = key == found and all(ref() is w for ref, w in zip(known, weights, strict=True))
        if not same or not all(torch.equal(w, v) for w, v in zip(weights, values, strict=False)):
            values = [w.detach().clone() for w in weights if w.device.type == "cpu"]
            made = make(weights)
            self._kept[name] = [weakref.ref(w) for w in weights], key, values, made
        return made
