"""Contribution kernels against the float64 reference and its autograd."""

import pytest
import torch

from esl_fast.kernels import contribution as kernels
from esl_fast.kernels._common import INTERPRETING
from esl_fast.kernels.aggregate import padded_rows
from esl_fast.reference import contribution as reference

SIDES = ("text", "image")
torch.set_num_threads(1)


def ratio(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm wanted; NaN where anything is."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Float64 leaves on the CPU for the reference."""
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


W = {
    "spread": [0.3, -0.2, 0.15, 0.1, -0.4, 0.05, 0.22, -0.11, 0.37],
    "ties": [0.3, -0.3, 0.1, 0.1, -0.1, 0.2, 0.3],
    "initial": [0.1] * 9,
    "zero": [0.0, 0.2, -0.1],
    "one": [0.7],
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", W)
@pytest.mark.parametrize(
    ("sigmoid_gate", "sharp", "mean"), [(True, True, True), (False, True, False), (False, False, False)]
)
def test_degrees(name, sigmoid_gate, sharp, mean, device):
    w = torch.tensor(W[name], device=device, requires_grad=True)
    first = torch.tensor([[-1.0 if sigmoid_gate else 0.2]], device=device, requires_grad=True)
    second = torch.tensor([2.0], device=device, requires_grad=True)
    scales = kernels.degrees_scales(w, first, second, sigmoid_gate=sigmoid_gate, sharp=sharp, mean=mean)
    w64, first64, second64 = leaves(w, first, second)
    gate = first64.sigmoid() if sigmoid_gate else first64
    sharpness = second64.exp() if sharp else second64 * 0
    wanted = reference.degrees(w64, gate.squeeze(), sharpness.squeeze())
    wanted = wanted / len(wanted) if mean else wanted
    assert ratio(scales, wanted) < 2e-6
    grad = torch.randn_like(wanted)
    scales.backward(grad.float().to(device))
    wanted.backward(grad)
    for found, leaf in ((w, w64), (first, first64), (second, second64)):
        assert (found.grad.cpu() - leaf.grad).norm() < 5e-6 * leaf.grad.norm() + 1e-6 * grad.norm()


def problem(n, dims, dtype, device):
    """Units in padded rows whose padding is NaN, matrices and scales."""
    units = padded_rows(n, sum(dims), dtype, device)
    if n:
        units.as_strided((n, units.stride(0)), (units.stride(0), 1)).fill_(float("nan"))
    units.copy_(torch.randn(n, sum(dims)))
    matrices = [torch.randn(dim, dim).to(device).requires_grad_() for dim in dims]
    return units.requires_grad_(), matrices, torch.randn(len(dims)).to(device).requires_grad_()


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request, monkeypatch, device):
    """Both ways to load tiles: interpreted always, on a GPU where it has descriptors."""
    wanted = request.param == "descriptors"
    if wanted and device.type == "cuda" and not kernels._has_descriptors(device):
        pytest.skip("no tensor descriptors on this GPU")
    monkeypatch.setattr(kernels, "_has_descriptors", lambda _: wanted)


@pytest.mark.usefixtures("poison", "loads")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("n", "dims"), [(70, [70, 35, 17]), (1, [5]), (67, [37, 12]), (300, [30, 7]), (5, [64, 32])])
def test_fold(n, dims, side, device):
    torch.manual_seed(n)
    units, matrices, scales = problem(n, dims, torch.float32, device)
    units64, scales64, *matrices64 = leaves(units, scales, *matrices)
    folded = kernels.fold(units, matrices, scales, side)
    wanted = reference.fold(units64, matrices64, scales64, side=side)
    assert ratio(folded, wanted) < 1e-6
    assert not folded.as_strided((n, folded.stride(0) - sum(dims)), folded.stride(), sum(dims)).any()
    grad = torch.randn_like(wanted)
    folded.backward(grad.float().to(device))
    wanted.backward(grad)
    for found, leaf in zip((units, scales, *matrices), (units64, scales64, *matrices64), strict=True):
        assert ratio(found.grad, leaf.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_half_is_no_worse_than_naive(side, dtype, device):
    torch.manual_seed(0)
    dims = [136, 34, 8]
    units, matrices, scales = problem(129, dims, dtype, device)
    units64, scales64, *matrices64 = leaves(units, scales, *matrices)
    rough = [t.detach().to(dtype).cpu().requires_grad_() for t in (units, scales, *matrices)]
    folded = kernels.fold(units, matrices, scales, side)
    wanted = reference.fold(units64, matrices64, scales64, side=side)
    naive = reference.fold(rough[0], rough[2:], rough[1], side=side)
    assert folded.dtype == dtype
    assert ratio(folded, wanted) <= ratio(naive, wanted)
    grad = torch.randn_like(wanted).to(dtype)
    folded.backward(grad.to(device))
    wanted.backward(grad.double())
    naive.backward(grad)
    exact = (units64, scales64, *matrices64)
    for mine, leaf, other in zip((units, scales, *matrices), exact, rough, strict=True):
        assert ratio(mine.grad, leaf.grad) <= ratio(other.grad, leaf.grad)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
def test_strides(kind, device):
    torch.manual_seed(1)
    dims, n = [20, 10, 5], 6
    units = {
        "transposed": torch.randn(35, n).T,
        "sliced": torch.randn(2 * n + 1, 111)[1::2, 6::3],
        "expanded": torch.randn(35).expand(n, 35),
    }[kind].to(device)
    _, matrices, scales = problem(n, dims, torch.float32, device)
    results = []
    for x in (units, units.contiguous()):
        x = x.detach().requires_grad_()
        folded = kernels.fold(x, matrices, scales, "text")
        grad = units if x.is_contiguous() else units.contiguous()
        results.append((folded, *torch.autograd.grad(folded, (x, scales, *matrices), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("side", SIDES)
def test_empty(side, device):
    units, matrices, scales = problem(0, [8, 4], torch.float32, device)
    folded = kernels.fold(units, matrices, scales, side)
    assert folded.shape == (0, 12)
    folded.sum().backward()
    assert all(not parameter.grad.any() for parameter in (scales, *matrices))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_some_gradients(which, device):
    units, matrices, scales = problem(3, [4, 2], torch.float32, device)
    groups = [[units], matrices, [scales]]
    detached = [[t.detach().requires_grad_(i == which) for t in group] for i, group in enumerate(groups)]
    kernels.fold(detached[0][0], detached[1], detached[2][0], "text").square().sum().backward()
    for i, group in enumerate(detached):
        assert all((tensor.grad is not None) == (i == which) for tensor in group)


def test_deterministic(device):
    units, matrices, scales = problem(600, [16, 8], torch.float32, device)
    results = []
    for _ in range(2):
        folded = kernels.fold(units, matrices, scales, "image")
        results.append((folded, *torch.autograd.grad(folded.square().sum(), (units, scales, *matrices))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_far_addresses(device):
    """Elements more than 2^31 apart in one tensor (memory that is only reserved, apart from a few pages)."""
    buffer = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device)
    units = buffer.as_strided((3, 12), (2**30, 100))
    values, matrices, scales = problem(3, [8, 4], torch.float16, device)
    units.copy_(values.detach())
    assert torch.equal(kernels.fold(units, matrices, scales, "text"), kernels.fold(values, matrices, scales, "text"))


def test_opcheck(device):
    units, matrices, scales = problem(3, [4, 2], torch.float32, device)
    torch.library.opcheck(kernels._fold.registered, (units, matrices, kernels._flat(matrices), scales, "text"))
    w = torch.randn(3).to(device).requires_grad_()
    temperatures = [torch.randn(1).to(device).requires_grad_() for _ in range(2)]
    torch.library.opcheck(torch.ops.esl_fast.degrees_scales.default, (w, *temperatures, True, True, True))
