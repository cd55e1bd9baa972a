"""Aggregation kernels against the float64 reference and its autograd."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from esl_fast.kernels import aggregate as kernels
from esl_fast.kernels._common import INTERPRETING
from esl_fast.kernels.select import select
from esl_fast.reference import aggregate as reference

GOLDEN = Path(__file__).parents[1] / "golden"
CHAINS = ("normalized", "raw")
torch.set_num_threads(1)


def ratio(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm wanted; NaN where anything is."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    if wanted.numel() == 0:
        assert found.shape == wanted.shape
        return 0.0
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Float64 leaves on the CPU for the reference."""
    return [t.detach().double().cpu().requires_grad_() for t in tensors]


def adaptive_weights(dims: list[int], device: torch.device, ties: bool = True) -> list[torch.Tensor]:
    weights = [torch.randn(rows, columns) for columns, rows in pairwise(dims)]
    if ties:
        weights[0][0] = 0.25  # all equal
        weights[0][1, ::2] = 3.0  # many largest
        weights[-1][0] = weights[-1][0].max()
        if dims[0] > 4:
            weights[0][2, 0], weights[0][2, 1:4] = 9.0, 5.0  # a tie for the second
    return [weight.to(device).requires_grad_() for weight in weights]


def strided(n: int, d: int, kind: str, device: torch.device, dtype=torch.float32) -> torch.Tensor:
    if kind == "contiguous":
        x = torch.randn(n, d)
    elif kind == "transposed":
        x = torch.randn(d, n).T
    elif kind == "sliced":
        x = torch.randn(2 * n + 1, 3 * d + 5)[1::2, 5::3]
    else:
        x = torch.randn(d).expand(n, d)
    return x.to(device, dtype)


HEURISTIC = [
    (5, 512, 2, 8),
    (3, 1152, 2, 8),
    (3, 640, 2, 8),
    (2, 768, 2, 3),
    (7, 257, 2, 8),
    (3, 101, 3, 4),
    (4, 50, 7, 2),
    (3, 12, 1, 2),
    (1, 1, 1, 1),
    (2, 16, 2, 0),
    (9, 64, 4, 3),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "d", "s", "levels"), HEURISTIC)
def test_heuristic(n, d, s, levels, normalize, chain, device):
    torch.manual_seed(d)
    x = torch.randn(n, d).to(device).requires_grad_()
    taps = torch.randn(levels, s).to(device).requires_grad_()
    x64, taps64 = leaves(x, taps)
    units = kernels.aggregate_heuristic(x, taps, chain, normalize)
    wanted = reference.aggregate(x64, list(taps64), chain=chain, normalize=normalize)
    assert ratio(units, wanted) < 1e-6
    grad = torch.randn_like(wanted)
    units.backward(grad.float().to(device))
    wanted.backward(grad)
    # A level of one tap, or of one unit, is normalised to +-1: its gradients vanish and only rounding is left.
    floor = 1e-6 * (grad.norm() + x64.grad.norm())
    assert (x.grad.cpu() - x64.grad).norm() < 5e-6 * x64.grad.norm() + floor
    if levels:
        assert (taps.grad.cpu() - taps64.grad).norm() < 5e-6 * taps64.grad.norm() + floor


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "dims"), [(5, [16, 8, 4, 2, 1]), (7, [37, 12, 4]), (3, [5, 9, 2]), (1, [3, 3, 1])])
def test_adaptive(n, dims, normalize, chain, device):
    torch.manual_seed(dims[0])
    x = torch.randn(n, dims[0]).to(device).requires_grad_()
    weights = adaptive_weights(dims, device)
    x64, *weights64 = leaves(x, *weights)
    units = kernels.aggregate_adaptive(x, weights, select(weights), chain, normalize)
    selected = [reference.select_top2(weight) for weight in weights64]
    wanted = reference.aggregate(x64, selected, chain=chain, normalize=normalize)
    assert ratio(units, wanted) < 2e-6
    grad = torch.randn_like(wanted)
    units.backward(grad.float().to(device))
    wanted.backward(grad)
    floor = 1e-6 * (grad.norm() + x64.grad.norm())
    for found, leaf in zip((x, *weights), (x64, *weights64), strict=True):
        assert (found.grad.cpu() - leaf.grad).norm() < 5e-6 * leaf.grad.norm() + floor


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dims", [[37, 18, 9, 1], [1, 1], [5, 9, 2]])
def test_selection(dims, device):
    """Both lists hold exactly the reference's selection, in float32, and zeros beyond their counts."""
    torch.manual_seed(1)
    weights = adaptive_weights(dims, device, ties=dims[1] > 2)
    if dims[0] > 2:
        weights[0].data[-1] = 0.0
    selection = select(weights)
    first_row = first_column = start = 0
    for weight in weights:
        rows, columns = weight.shape
        wanted = reference.select_top2(weight).detach().cpu()
        kept = wanted != 0
        part = slice(start, start + rows * columns)
        counts = selection.counts[first_row : first_row + rows].cpu()
        lists = [tensor[part].cpu() for tensor in selection[1:3] + selection[4:6]]
        columns_of, values = (tensor.view(columns, rows).T for tensor in lists[:2])
        rows_of, back_values = (tensor.view(rows, columns) for tensor in lists[2:])
        by_row = torch.zeros(rows, columns).scatter_(1, columns_of.long(), values)
        by_column = torch.zeros(rows, columns).scatter_(0, rows_of.long(), back_values)
        assert torch.equal(by_row != 0, kept)
        assert torch.equal(by_row, by_column)
        assert ratio(by_row, wanted) < 3e-7
        nonzero_rows = weight.detach().cpu().norm(dim=1) > 0
        assert torch.equal(counts[nonzero_rows], kept.sum(1)[nonzero_rows].int())
        assert (counts[~nonzero_rows] == columns).all()
        back_counts = selection.back_counts[first_column : first_column + columns].cpu()
        assert torch.equal(back_counts, kept.sum(0).int())
        first_row, first_column, start = first_row + rows, first_column + columns, start + rows * columns


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_shows(bad, device):
    weights = adaptive_weights([8, 4, 2], device, ties=False)
    weights[1].data[0, 2] = bad
    units = kernels.aggregate_adaptive(torch.randn(3, 8, device=device), weights, select(weights), "raw")
    assert units[:, 12:].isnan().all()
    assert units[:, :12].isfinite().all()


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_strides(kind, adaptive, device):
    torch.manual_seed(0)
    x = strided(5, 12, kind, device).requires_grad_()
    parameters = adaptive_weights([12, 6, 3], device) if adaptive else [torch.randn(2, 2).to(device).requires_grad_()]

    def run(x):
        if adaptive:
            return kernels.aggregate_adaptive(x, parameters, select(parameters), "raw")
        return kernels.aggregate_heuristic(x, parameters[0], "raw")

    grad = strided(5, 21, kind, device)
    found = torch.autograd.grad(run(x), (x, *parameters), grad)
    again = x.detach().contiguous().requires_grad_()
    wanted = torch.autograd.grad(run(again), (again, *parameters), grad.contiguous())
    # Other strides compile to another order of sums.
    for a, b in zip((run(x), *found), (run(again), *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_strides_of_weights(adaptive, device):
    x = torch.randn(5, 12, device=device)
    if adaptive:
        weights = [w.detach().mT.contiguous().mT for w in adaptive_weights([12, 6, 3], device)]
        dense = [w.contiguous() for w in weights]
        found, wanted = (kernels.aggregate_adaptive(x, w, select(w), "raw") for w in (weights, dense))
    else:
        taps = torch.randn(2, 2, device=device).T
        found, wanted = (kernels.aggregate_heuristic(x, given, "raw") for given in (taps, taps.contiguous()))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_half_is_no_worse_than_naive(adaptive, chain, dtype, device):
    torch.manual_seed(2)
    x = torch.randn(6, 24).to(device, dtype).requires_grad_()
    weights = adaptive_weights([24, 12, 6, 3], device, ties=False) if adaptive else [torch.randn(3, 2).to(device)]
    weights = [weight.detach().to(dtype).float().requires_grad_() for weight in weights]
    x64, *weights64 = leaves(x, *weights)
    naive_x, *naive_weights = [t.detach().to(dtype).cpu().requires_grad_() for t in (x, *weights)]

    def definition(x, weights):
        levels = [reference.select_top2(w) for w in weights] if adaptive else list(weights[0])
        return reference.aggregate(x, levels, chain=chain)

    wanted, naive = definition(x64, weights64), definition(naive_x, naive_weights)
    if adaptive:
        units = kernels.aggregate_adaptive(x, weights, select(weights), chain)
    else:
        units = kernels.aggregate_heuristic(x, weights[0], chain)
    assert units.dtype == dtype
    assert ratio(units, wanted) <= ratio(naive, wanted)
    grad = torch.randn_like(wanted).to(dtype)
    units.backward(grad.to(device))
    wanted.backward(grad.double())
    naive.backward(grad)
    for mine, exact, rough in zip((x, *weights), (x64, *weights64), (naive_x, *naive_weights), strict=True):
        assert ratio(mine.grad, exact.grad) <= ratio(rough.grad, exact.grad)


@pytest.mark.usefixtures("poison")
def test_empty(device):
    x = torch.empty(0, 8).to(device).requires_grad_()
    taps = torch.randn(2, 2).to(device).requires_grad_()
    weights = adaptive_weights([8, 4, 2], device)
    heuristic = kernels.aggregate_heuristic(x, taps, "raw")
    for units in (heuristic, kernels.aggregate_adaptive(x, weights, select(weights), "raw")):
        assert units.shape == (0, 14)
        units.sum().backward()
    assert all(not parameter.grad.any() for parameter in (taps, *weights))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("adaptive", [False, True])
def test_rows_are_padded_with_zeros(adaptive, device):
    x, weights = torch.randn(3, 8).to(device), adaptive_weights([8, 4, 2], device)
    if adaptive:
        units = kernels.aggregate_adaptive(x, weights, select(weights), "normalized")
    else:
        units = kernels.aggregate_heuristic(x, torch.randn(2, 2).to(device), "normalized")
    assert units.stride() == (64, 1)
    assert not units.as_strided((3, 50), (64, 1), 14).any()


def test_zero_level_has_zero_gradient(device):
    """A level of zeros stays zero; embeddings of zeros without normalisation too (padded words)."""
    x = torch.randn(3, 8).to(device)
    x[1] = 0
    x.requires_grad_()
    taps = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).to(device).requires_grad_()
    x64, taps64 = leaves(x, taps)
    units = kernels.aggregate_heuristic(x, taps, "raw", False)
    wanted = reference.aggregate(x64, list(taps64), chain="raw", normalize=False)
    grad = torch.randn_like(wanted)
    units.backward(grad.float().to(device))
    wanted.backward(grad)
    assert ratio(units, wanted) < 1e-6
    assert ratio(x.grad, x64.grad) < 1e-6
    assert ratio(taps.grad, taps64.grad) < 1e-6


@pytest.mark.parametrize("which", [(True, False), (False, True)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_some_gradients(which, adaptive, device):
    torch.manual_seed(3)
    x = torch.randn(3, 8).to(device).requires_grad_(which[0])
    weights = adaptive_weights([8, 4, 2], device) if adaptive else [torch.randn(2, 2).to(device)]
    weights = [weight.detach().requires_grad_(which[1]) for weight in weights]
    if adaptive:
        units = kernels.aggregate_adaptive(x, weights, select(weights), "raw")
    else:
        units = kernels.aggregate_heuristic(x, weights[0], "raw")
    units.square().sum().backward()
    assert (x.grad is not None) == which[0]
    assert all((weight.grad is not None) == which[1] for weight in weights)


@pytest.mark.parametrize("adaptive", [False, True])
def test_deterministic(adaptive, device):
    torch.manual_seed(4)
    x = torch.randn(21, 12).to(device).requires_grad_()
    weights = adaptive_weights([12, 6, 3], device) if adaptive else [torch.randn(2, 2).to(device).requires_grad_()]
    results = []
    for _ in range(2):
        if adaptive:
            units = kernels.aggregate_adaptive(x, weights, select(weights), "normalized")
        else:
            units = kernels.aggregate_heuristic(x, weights[0], "normalized")
        results.append((units, *torch.autograd.grad(units.pow(3).sum(), (x, *weights))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dims", [[8, 4], [8, 4, 2], [128, 64, 32]])
def test_adaptive_forward_of_more_than_all_programs_take_at_once(dims, monkeypatch, device):
    weights = adaptive_weights(dims, device)
    x = torch.randn(21, dims[0]).to(device)
    wanted = kernels.aggregate_adaptive(x, weights, select(weights), "raw")
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "processors", lambda device: 2)
    assert torch.equal(kernels.aggregate_adaptive(x, weights, select(weights), "raw"), wanted)


@pytest.mark.parametrize("adaptive", [False, True])
def test_far_addresses(adaptive, device):
    """Elements more than 2^31 apart in one tensor (memory that is only reserved, apart from a few pages)."""
    buffer = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 16), (2**30, 100))
    values = torch.randn(3, 16).to(device, torch.float16)
    x.copy_(values)
    if adaptive:
        weights = adaptive_weights([16, 8], device)
        found, wanted = (kernels.aggregate_adaptive(v, weights, select(weights), "raw") for v in (x, values))
    else:
        taps = torch.randn(2, 2).to(device)
        found, wanted = (kernels.aggregate_heuristic(v, taps, "raw") for v in (x, values))
    assert torch.equal(found, wanted)


def test_opcheck(device):
    x = torch.randn(3, 8).to(device).requires_grad_()
    taps = torch.randn(2, 2).to(device).requires_grad_()
    weights = adaptive_weights([8, 4, 2], device, ties=False)
    selection = select(weights)
    torch.library.opcheck(torch.ops.esl_fast.aggregate_heuristic.default, (x, taps, "raw", True))
    torch.library.opcheck(torch.ops.esl_fast.aggregate_adaptive.default, (x, weights, list(selection), "raw", True))
    weights = [weight.detach() for weight in weights]
    torch.library.opcheck(torch.ops.esl_fast.select.default, (weights,))


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_zeros_have_no_gradient(aggregator, device):
    x = torch.randn(3, 64).to(device)
    x[2] = 0
    x.requires_grad_()
    weights = [torch.randn(64 >> k, 128 >> k).to(device).requires_grad_() for k in range(1, 7)]
    if aggregator == "heuristic":
        leaves = [x, torch.randn(6, 2).to(device).requires_grad_()]
        units = kernels.aggregate_heuristic(*leaves, "normalized", False)
    else:
        with torch.no_grad():
            weights[3][1] = 0
        leaves = [x, *weights]
        units = kernels.aggregate_adaptive(x, weights, select(weights), "normalized", False)
    gradients = torch.autograd.grad(units, leaves, torch.randn_like(units))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_errors(device):
    with pytest.raises(ValueError, match="chain"):
        select([torch.randn(4, 8).to(device), torch.randn(2, 3).to(device)])


@pytest.mark.parametrize(
    ("name", "side", "short"),
    [
        ("clip_heuristic_d256_train", "image", "img"),
        ("clip_heuristic_d256_train", "text", "txt"),
        ("clip_adaptive_d256_train", "text", "txt"),
    ],
)
def test_golden(name, side, short, device):
    file = GOLDEN / f"{name}.safetensors"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    from safetensors.torch import load_file

    golden = load_file(file)
    prefix = "param.pool_frames.cross_attn.plus_encoder.encoders_1."
    chain = "normalized" if side == "image" else "raw"
    x = golden[f"{side}_features"][:4].to(device)
    parameters = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    if "heuristic" in name:
        levels = [parameters[f"{side}_levels.kernel_{short}_{level}.weight"] for level in range(1, 9)]
        units = kernels.aggregate_heuristic(x, torch.stack([v.sum((0, 1)) for v in levels]).to(device), chain)
    else:
        weights = [parameters[f"{side}_levels.masks_{level}.weight"].to(device) for level in range(1, 9)]
        units = kernels.aggregate_adaptive(x, weights, select(weights), chain)
    assert ratio(units, golden[f"{side}_units"][:4]) < 1e-5
