"""What is made of weights, kept for as long as they stay what they are."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_caches: weakref.WeakSet["WeightsCache"] = weakref.WeakSet()
_lock = threading.Lock()


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A fused optimizer changes weights without raising their versions."""
    if torch.compiler.is_compiling():
        return
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _lock:
        caches = list(_caches)
    for cache in caches:
        cache.drop(stepped)


_hook = register_optimizer_step_post_hook(_forget_stepped)


class WeightsCache:
    """Keeps what was made of weights, one thing a kind, until one of them is replaced or changes in place.

    A change shows in the weight's version, or follows an optimizer's step. One that does neither (``weight.data``, a
    replayed CUDA graph, FSDP's gathering) is seen on a CPU, where the values are compared as well; on a GPU that would
    need a synchronisation, and :meth:`clear` is the caller's. Each stream of a GPU has its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple] = {}
        with _lock:
            _caches.add(self)

    def clear(self) -> None:
        self._kept.clear()

    def drop(self, weights: set[int]) -> None:
        """Forget what was made of weights of these ids."""
        for name, (known, *_) in list(self._kept.items()):
            if any(id(weight) in weights for weight in known):
                self._kept.pop(name, None)

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
        key = [(w.data_ptr(), w._version, w.dtype) for w in weights]
        name = kind, len(weights), stream
        # The weights themselves are kept: an address, or an id, may serve another tensor later.
        known, found, values, made = self._kept.get(name, ((), None, (), None))
        same = key == found and all(a is b for a, b in zip(known, weights, strict=True))
        if not same or not all(torch.equal(w, v) for w, v in zip(weights, values, strict=False)):
            values = [w.detach().clone() for w in weights if w.device.type == "cpu"]
            made = make(weights)
            self._kept[name] = list(weights), key, values, made
        return made
