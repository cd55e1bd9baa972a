import pytest
import torch

from esl_fast.kernels import plan as plans
from esl_fast.kernels._common import padded_rows
from esl_fast.kernels.similarity import multiply, similarity, write_similarity


def units(n, width, device, dtype=torch.float32, seed=0):
    """Normal units in rows padded to a multiple of 64, as the aggregators leave them (the padding holds rubbish)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, -(-width // 64) * 64, generator=generator).to(device, dtype)[:, :width]


def error(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


def unrounded(a, b):
    out = padded_rows(len(a), len(b), torch.float32, a.device)
    multiply(a, b, out)
    return out


@pytest.mark.parametrize(
    ("n", "m", "width"),
    [(1, 1, 1), (1, 131, 61), (67, 1, 64), (33, 129, 510), (97, 65, 1022), (40, 70, 2303), (5, 3, 0)],
)
def test_matches_float64(n, m, width, device, poison):
    a, b = units(n, width, device), units(m, width, device, seed=1)
    expected = a.double() @ b.double().mT
    value = similarity(a, b)
    assert value.shape == (n, m)
    assert width == 0 or error(value, expected) < 1e-6
    assert torch.equal(value, similarity(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_summed_in_float32(dtype, device, poison):
    a, b = units(50, 510, device, dtype), units(70, 510, device, dtype, seed=1)
    expected = a.double() @ b.double().mT
    assert error(unrounded(a, b), expected) < 1e-6
    assert similarity(a, b).dtype == dtype
    # The interpreter truncates where a GPU rounds.
    assert error(similarity(a, b), expected) < 2 * error(expected.to(dtype), expected)


def test_strides(device):
    a, b = units(200, 128, device), units(90, 256, device, seed=1)
    pairs = [(a[::3, ::2], b[:, 7:71]), (a.mT[:, :80].mT[:, ::2], b[5:, ::4]), (a[:1, :64].expand(9, 64), b[:, :64])]
    for x, y in pairs:
        assert error(similarity(x, y), x.double() @ y.double().mT) < 1e-6


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty(n, m, device):
    a, b = units(n, 10, device).requires_grad_(), units(m, 10, device).requires_grad_()
    similarity(a, b).sum().backward()
    assert a.grad.shape == a.shape
    assert not b.grad.any()


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients(needed, device, poison):
    a, b = units(37, 61, device).requires_grad_(needed[0]), units(70, 61, device, seed=1).requires_grad_(needed[1])
    grad = torch.randn(37, 70, device=device)
    similarity(a, b).backward(grad)
    for x, expected in ((a, grad.double() @ b.double()), (b, grad.double().mT @ a.double())):
        assert (x.grad is not None) == x.requires_grad
        assert x.grad is None or error(x.grad, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_descriptors_read_what_pointers_read(dtype, device):
    if device.type == "cuda" and plans.target_of(device) not in plans.TMA_CONFIGS:
        pytest.skip("needs a GPU with TMA")
    a, b = units(45, 157, device, dtype), units(133, 157, device, dtype, seed=1)
    through = []
    for tma in (True, False):
        out = padded_rows(45, 133, torch.float32, device)
        write_similarity(plans.make_plan(a, b, tma=tma), out)
        through.append(out)
    expected = a.double() @ b.double().mT
    tolerance = 1e-6 if dtype == torch.float16 or device.type == "cpu" else 1e-3  # TF32 or the plan's, on a GPU
    assert all(error(out, expected) < tolerance for out in through)


def test_rows_beyond_int32(device):
    stride = 2**29 + 3
    a = torch.empty(8 * stride, dtype=torch.float16, device=device).as_strided((8, 20), (stride, 1))
    a.copy_(units(8, 20, device, torch.float16))
    b = units(5, 20, device, torch.float16, seed=1)
    assert error(unrounded(a, b), a.double() @ b.double().mT) < 1e-6
    assert error(unrounded(b, a), b.double() @ a.double().mT) < 1e-6


def test_tile_order_visits_every_tile_once(device):
    a, b = units(32 * 19 + 1, 3, device), units(64 * 2 + 1, 3, device, seed=1)
    assert error(similarity(a, b), a.double() @ b.double().mT) < 1e-6


def test_registration(device):
    a, b = units(5, 7, device).requires_grad_(), units(6, 7, device, seed=1).requires_grad_()
    torch.library.opcheck(similarity.registered, (a, b))
    torch.library.opcheck(similarity.registered, (a.half(), b.half()))
    compiled = torch.compile(lambda x, y: similarity(x, y) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), similarity(a, b) * 2)


def test_errors(device):
    a = units(3, 8, device)
    for wrong in (units(3, 9, device), a[0], a.double(), a.half()):
        with pytest.raises(ValueError, match="expected"):
            similarity(a, wrong)


def test_second_order_gradients_see_no_padding(device):
    buffer = torch.full((9, 64), torch.nan, device=device)
    a = buffer[:, :61].copy_(torch.randn(9, 61)).requires_grad_()
    b = torch.randn(7, 61, device=device, requires_grad=True)
    (first,) = torch.autograd.grad((similarity(a, b) ** 2).sum(), b, create_graph=True)
    found = torch.autograd.grad((first**2).sum(), (a, b))
    x, y = (t.detach().double().requires_grad_() for t in (a, b))
    (first,) = torch.autograd.grad(((x @ y.mT) ** 2).sum(), y, create_graph=True)
    for grad, wanted in zip(found, torch.autograd.grad((first**2).sum(), (x, y)), strict=True):
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm()
