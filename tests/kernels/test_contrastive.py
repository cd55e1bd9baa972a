from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from esl_fast.kernels import contrastive
from esl_fast.kernels._common import INTERPRETING
from esl_fast.kernels.contrastive import contrastive_backward, contrastive_forward, contrastive_loss
from esl_fast.reference.contrastive import contrastive_loss as reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("clip_*_train.safetensors"))


def units(n, width, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) / width**0.5
    return torch.nn.functional.pad(x, (0, -width % 64), value=9.0).to(device, dtype)[:, :width]


def ids(n, device, high, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high, (n,), generator=generator).to(device) * 2**33


def error(value, expected):
    return ((value.double() - expected).norm() / expected.norm()).item()


def run(loss, inputs, *args):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, *args)
    (value * 3).backward()
    return value.detach(), [x.grad for x in leaves]


def by_definition(a, b, scale, *args):
    return reference(a @ b.mT, scale, *args)


def case(mode, n, m, width, device, dtype=torch.float32):
    inputs = (units(n, width, device, dtype), units(m, width, device, dtype, seed=1), torch.tensor(20.0, device=device))
    if mode == "diagonal":
        return inputs, ()
    if mode == "ignore":
        shared = ids(n, device, n // 3 + 1)
        return inputs, (shared, shared, mode)
    return inputs, (ids(n, device, 20), ids(m, device, 25, seed=1), mode)


SHAPES = [
    ("diagonal", 1, 1, 5),
    ("diagonal", 77, 77, 61),
    ("diagonal", 67, 67, 1022),
    ("positive", 1, 7, 61),
    ("positive", 70, 131, 61),
    ("positive", 131, 40, 255),
    ("ignore", 77, 77, 61),
    ("negative", 40, 40, 33),
]


@pytest.fixture(params=[0, 1 << 60], ids=["centered", "online"])
def either_pass(request, monkeypatch):
    monkeypatch.setattr(contrastive, "CENTERED_FROM", request.param)


@pytest.mark.parametrize(("mode", "n", "m", "width"), SHAPES)
def test_matches_float64(mode, n, m, width, device, poison, either_pass):
    inputs, args = case(mode, n, m, width, device)
    value, grads = run(contrastive_loss, inputs, *args)
    expected, expected_grads = run(by_definition, [x.double() for x in inputs], *args)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) <= 1e-6 * max(1.0, abs(expected.item()))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted) < 3e-6 or (grad - wanted).norm() < 1e-6  # a 1 x 1 matrix has no gradient
    again, grads_again = run(contrastive_loss, inputs, *args)
    assert torch.equal(value, again)
    assert all(map(torch.equal, grads, grads_again))


# The interpreter cuts off what bfloat16 does not hold.
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["diagonal", "positive"])
def test_16_bits_beat_the_naive_path(mode, dtype, device, poison, either_pass):
    inputs, args = case(mode, 90, 90, 126, device, dtype)
    value, grads = run(contrastive_loss, inputs, *args)
    exact, exact_grads = run(by_definition, [x.double() for x in inputs], *args)
    naive, naive_grads = run(by_definition, [x.to(dtype) for x in inputs], *args)
    assert error(value, exact) < 1e-6
    assert error(value, exact) <= error(naive, exact)
    for grad, wanted, plain in zip(grads, exact_grads, naive_grads, strict=True):
        assert error(grad, wanted) < error(plain, wanted)


def test_small_weights_survive_float16(device, either_pass):
    """Gradients of a batch whose probabilities, over the batch size, are below float16's smallest number."""
    inputs, _ = case("diagonal", 130, 130, 20, device, torch.float16)
    inputs = (inputs[0], inputs[1], torch.tensor(1e-3, device=device))
    _, grads = run(contrastive_loss, inputs)
    _, expected = run(by_definition, [x.double() for x in inputs])
    assert error(grads[2], expected[2]) < 1e-4


def test_large_logits(device, either_pass):
    inputs, args = case("diagonal", 70, 70, 61, device)
    inputs = (inputs[0] * 30, inputs[1], torch.tensor(100.0, device=device))
    value, grads = run(contrastive_loss, inputs, *args)
    expected, expected_grads = run(by_definition, [x.double() for x in inputs], *args)
    assert error(value, expected) < 1e-6
    assert all(error(g, e) < 2e-4 for g, e in zip(grads, expected_grads, strict=True))  # logits of 1e4, eps 1e-3


@pytest.mark.parametrize(("mode", "ratio"), [("positive", 2), ("diagonal", 1), ("ignore", 1)])
def test_several_chunks(mode, ratio, device, monkeypatch, either_pass):
    chunk = 32 if INTERPRETING else 256  # one tile or two
    monkeypatch.setattr(contrastive, "_chunk", lambda plan: chunk)
    monkeypatch.setattr(contrastive, "FINISH_BLOCK", 16)  # several parts of each sum
    monkeypatch.setattr(contrastive, "SCALE_BLOCK", 2)
    n = 2 * chunk + 6
    inputs, args = case(mode, n, ratio * n, 61, device)
    value, grads = run(contrastive_loss, inputs, *args)
    wanted, expected = run(by_definition, [x.double() for x in inputs], *args)
    assert error(value, wanted) < 1e-6
    assert all(error(g, e) < 3e-6 for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("programs", "rows", "expected"),
    [(132, 256, 8448), (132, 128, 4224), (108, 128, 6912), (148, 128, 4736), (3, 32, 4096)],
)
def test_chunks_fill_the_last_round(programs, rows, expected):
    plan = SimpleNamespace(programs=programs, config=SimpleNamespace(rows=rows))
    assert contrastive._chunk(plan) == expected


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0), (6, 9)])
def test_without_positives_the_loss_is_zero(n, m, device):
    inputs = (units(n, 10, device), units(m, 10, device), torch.tensor(2.0, device=device))
    image_ids, text_ids = torch.arange(n, device=device), torch.arange(m, device=device) + 100
    value, grads = run(contrastive_loss, inputs, image_ids, text_ids)
    assert value == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_any_subset_of_gradients(needed, device):
    inputs, args = case("diagonal", 40, 40, 20, device)
    _, expected = run(contrastive_loss, inputs, *args)
    leaves = [x.clone().requires_grad_(bool(need)) for x, need in zip(inputs, needed, strict=True)]
    (contrastive_loss(*leaves) * 3).backward()
    for leaf, need, wanted in zip(leaves, needed, expected, strict=True):
        assert torch.equal(leaf.grad, wanted) if need else leaf.grad is None


def test_strides(device):
    a, b = units(140, 128, device)[::2, ::2], units(64, 140, device, seed=1).mT[::2]
    inputs = (a, b, torch.tensor([7.0], device=device))
    leaves = [x.requires_grad_() for x in inputs]
    value = contrastive_loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_definition(*doubles)
    assert error(value, expected) < 1e-6
    assert all(error(g, e) < 3e-6 for g, e in zip(grads, torch.autograd.grad(expected.sum(), doubles), strict=True))


def test_rows_beyond_int32(device):
    stride = 2**29 + 3
    a = torch.empty(8 * stride, dtype=torch.float16, device=device).as_strided((8, 20), (stride, 1))
    a.copy_(units(8, 20, device, torch.float16))
    b, scale = units(8, 20, device, torch.float16, seed=1), torch.tensor(5.0, device=device)
    assert error(contrastive_loss(a, b, scale), by_definition(a.double(), b.double(), scale)) < 1e-6
    a.requires_grad_()
    contrastive_loss(a, b, scale).backward()


@pytest.mark.parametrize("mode", ["diagonal", "positive"])
def test_a_nan_shows(mode, device, either_pass):
    inputs, args = case(mode, 70, 70, 20, device)
    inputs[0][3, 3] = torch.nan
    assert contrastive_loss(*inputs, *args).isnan()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path, device):
    golden = {key: value.to(device) for key, value in load_file(path).items()}
    similarity = golden["similarity"]
    log_scale = golden["logit_scale"].clone().requires_grad_()
    loss = contrastive_loss(similarity, torch.eye(similarity.shape[1], device=device), log_scale.exp())
    loss.backward()
    assert error(loss, golden["loss"].double()) < 1e-6
    assert error(log_scale.grad, golden["grad.logit_scale"].double()) < 1e-4


@pytest.mark.parametrize("mode", ["diagonal", "positive"])
def test_registration(mode, device):
    inputs, args = case(mode, 9, 9, 12, device)
    leaves = [x.requires_grad_() for x in inputs]
    number = contrastive.DIAGONAL
    ordinals = (None, None)
    if args:
        number, ordinals = contrastive.POSITIVE, contrastive._ordinals(*args[:2])
    call = (*leaves, *ordinals, number)
    torch.library.opcheck(contrastive_forward.registered, call)
    saved = [x.detach() for x in contrastive_forward(*call)[1:]]
    grad = torch.ones((), device=device)
    plain = [x.detach() for x in leaves]
    torch.library.opcheck(contrastive_backward.registered, (grad, *plain, *ordinals, number, saved, True, False))
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, *args), contrastive_loss(*leaves, *args))
