"""What eager calls of the kernels' ops do without the dispatcher."""

import pytest
import torch

from esl_fast.kernels.aggregate import _aggregate_adaptive, _aggregate_heuristic
from esl_fast.kernels.select import select
from esl_fast.kernels.similarity import similarity


def calls(device):
    """Ops with arguments, some in lists, and the tensors among these that have gradients."""
    torch.manual_seed(0)
    x, y = (torch.randn(5, 12, device=device, requires_grad=True) for _ in range(2))
    taps = torch.randn(2, 2, device=device, requires_grad=True)
    weights = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 12), (3, 6))]
    return [
        (similarity, (x, y), (x, y)),
        (_aggregate_heuristic, (x, taps, "raw", True), (x, taps)),
        (_aggregate_adaptive, (x, weights, list(select(weights)), "normalized", True), (x, *weights)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_equals_the_registered_op(which, device):
    op, args, leaves = calls(device)[which]
    grads = []
    for call in (op, op.registered):
        result = call(*args)
        grads.append((result, *torch.autograd.grad(result.square().sum(), leaves)))
    assert all(map(torch.equal, *grads))
    with torch.no_grad():
        assert not op(*args).requires_grad


@pytest.mark.parametrize("which", range(3))
def test_results_may_be_written_to(which, device):
    op, args, leaves = calls(device)[which]
    doubled = torch.autograd.grad(op(*args).mul_(2).sum(), leaves)
    single = torch.autograd.grad(op(*args).sum(), leaves)
    # On a GPU another layout of the gradient is another order of summing.
    bounds = {} if device.type == "cuda" else {"rtol": 0, "atol": 0}
    for a, b in zip(doubled, single, strict=True):
        torch.testing.assert_close(a, 2 * b, **bounds)


def test_second_derivatives_are_right_or_refused(device):
    _, (op, args, leaves), _ = calls(device)
    # Whole numbers, so that the order of summation does not matter.
    x, y = (torch.randint(-2, 3, (5, 12), device=device).float().requires_grad_() for _ in range(2))
    first = torch.autograd.grad(similarity(x, y).square().sum(), x, create_graph=True)[0]
    expected = torch.autograd.grad((x @ y.mT).square().sum(), x, create_graph=True)[0]
    for a, b in zip(*(torch.autograd.grad(g.square().sum(), (x, y)) for g in (first, expected)), strict=True):
        torch.testing.assert_close(a, b)
    first = torch.autograd.grad(op(*args).square().sum(), leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()


def test_modes_and_subclasses_see_the_registered_op(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    op, args, _ = calls(device)[0]
    with torch.no_grad(), Watch():
        op(*args)
    assert op.registered in seen
