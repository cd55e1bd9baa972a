"""Which implementation runs: Triton kernels or PyTorch."""

import torch
from torch import Tensor

from esl_fast._eager import is_transformed
from esl_fast.kernels._common import runs_here
from esl_fast.ops import checks

BACKENDS = ("auto", "triton", "torch")
_active = "auto"


class use_backend:
    """Choose the implementation of ops: ``"triton"``, ``"torch"`` or ``"auto"`` (Triton on a GPU, else PyTorch).

    What has no kernel is PyTorch either way: the hinge loss of a matrix, pairs picked out by a shortlist or by hardest
    negatives, captions of more than 128 words, more than 1,024 best matches, a search of a float64 gallery, counting
    and sorting scores of regions and words; and units, similarities and losses that a transform of `torch.func` or
    forward-mode differentiation goes through.

    Takes effect at once, in all threads, and, used as a context manager, is undone at its end:

    >>> with esl_fast.use_backend("torch"):
    ...     scores = head(image_features, text_features)

    Raises ValueError for another name.
    """

    def __init__(self, name: str):
        checks.one_of("backend", name, BACKENDS)
        self._name, self._replaced, self._entered = name, [], False
        self._choose()

    def _choose(self) -> None:
        global _active
        self._replaced.append(_active)
        _active = self._name

    def __enter__(self) -> "use_backend":
        if self._entered:  # the first time it was chosen when it was made
            self._choose()
        self._entered = True
        return self

    def __exit__(self, *exc) -> None:
        global _active
        _active = self._replaced.pop()


def use_kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels serve these inputs. Raises RuntimeError if they were asked for and cannot."""
    able = all(runs_here(t) and t.dtype != torch.float64 for t in tensors)
    if _active == "triton" and not able:
        given = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise RuntimeError(
            f'backend "triton" takes float32, bfloat16 or float16 on a GPU, given {given}; '
            'use_backend("auto") falls back'
        )
    return able and _active != "torch" and not is_transformed()
