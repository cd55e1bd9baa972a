"""Gradients of a loss over a whole batch that is encoded part by part, to save memory (GradCache)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esl_fast.model.sequences import Features, concatenate, vectors_of, with_vectors

Batch = dict[str, Tensor]


def backward_in_parts(
    batch: Batch,
    parts: int,
    *,
    model: nn.Module,
    encode: Callable[[Batch], tuple[Features, Features]],
    loss_of: Callable[[Features, Features], Tensor],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Accumulate gradients as if the batch had been encoded in one piece; returns the loss.

    Features are computed first without a graph; the gradient of their loss is then carried into the towers part by
    part, so that every pair meets every other. Batch norm alone sees parts: it normalises each by its own statistics.
    """
    device = batch["tokens"].device
    chunks = [
        dict(zip(batch, values, strict=True))
        for values in zip(*(value.chunk(parts) for value in batch.values()), strict=True)
    ]
    with torch.no_grad(), _statistics_kept(model):
        generators, encoded = zip(*((_generators(device), encode(chunk)) for chunk in chunks), strict=True)
    features = [concatenate(side) for side in zip(*encoded, strict=True)]
    leaves = [vectors_of(side).requires_grad_() for side in features]
    loss = loss_of(*map(with_vectors, features, leaves))
    scale(loss).backward()
    gradients = zip(*(leaf.grad.split([len(c["tokens"]) for c in chunks]) for leaf in leaves), strict=True)
    for chunk, generator, both in zip(chunks, generators, gradients, strict=True):
        # Dropout must fall as it did when the features were computed.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _set_generators(generator, device)
            sides = [vectors_of(side) for side in encode(chunk)]
        # A part's captions may be shorter than the longest of the batch.
        pairs = [(side, grad[:, : side.shape[1]]) for side, grad in zip(sides, both, strict=True)]
        trained = [(side, grad) for side, grad in pairs if side.requires_grad]
        if trained:
            torch.autograd.backward(*zip(*trained, strict=True))
    return loss.detach()


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm's running statistics are afterwards what they were: parts that are encoded twice count once."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _generators(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
