"""Hinge ranking loss: the op against loops in float64, and the one of regions and words against autograd."""

import pytest
import torch
from helpers import relative_error

from esl_fast import blocked, ops, reference

IDS = {
    "none": lambda n: (None, None),
    "distinct": lambda n: (torch.arange(n), torch.arange(n)),
    "some equal": lambda n: (torch.arange(n) // 2, torch.arange(n) // 2),
    "rows differ from columns": lambda n: (torch.randint(4, (n,)), torch.randint(4, (n,))),
    "all equal": lambda n: (torch.zeros(n).long(), torch.zeros(n).long()),
}
hardest_or_all = pytest.mark.parametrize("hardest", [False, True])
some_ids = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


def by_loops(similarity, ids, margin, hardest):
    """Loss and gradient, pair by pair."""
    n, loss, grad = len(similarity), 0.0, torch.zeros_like(similarity)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        row = [(i, j) for j in others if ids[0] is None or ids[0][i] != ids[1][j]]
        column = [(j, i) for j in others if ids[0] is None or ids[0][j] != ids[1][i]]
        for negatives in (row, column):
            if hardest and negatives:
                negatives = [max(negatives, key=lambda pair: float(similarity[pair]))]
            for pair in negatives:
                cost = margin + float(similarity[pair]) - float(similarity[i, i])
                if cost > 0:
                    loss += cost
                    grad[pair] += 1
                    grad[i, i] -= 1
    return loss, grad


@pytest.fixture(params=[1 << 20, 1, 20])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(blocked.hinge, "BLOCK_ELEMENTS", request.param)


@hardest_or_all
@some_ids
@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("margin", [0.2, 0.0, 3.0])
@pytest.mark.usefixtures("block_elements")
def test_loss_and_gradient(hardest, ids, n, margin):
    similarity, ids = torch.randn(n, n, dtype=torch.float64, requires_grad=True), ids(n)
    loss = ops.hinge_loss(similarity, *ids, margin=margin, hardest=hardest)
    defined = reference.hinge.hinge_loss(similarity, *ids, margin=margin, hardest=hardest)
    expected, gradient = by_loops(similarity.detach(), ids, margin, hardest)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert defined.item() == pytest.approx(expected, abs=1e-12)
    for value in (loss, defined):
        torch.testing.assert_close(torch.autograd.grad(3 * value, similarity)[0], 3 * gradient, rtol=0, atol=0)


def test_the_official_sum():
    """Worked by hand: margin 0.2, a violation of 0.1 in a row, of 0.4 in a column, none elsewhere."""
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.6, 0.2], [0.0, 0.1, 0.7]])
    assert ops.hinge_loss(similarity).item() == pytest.approx(0.1 + 0.4)
    assert ops.hinge_loss(similarity, hardest=True).item() == pytest.approx(0.1 + 0.4)


@hardest_or_all
def test_ties_at_the_margin_and_among_the_hardest(hardest):
    similarity = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], requires_grad=True)
    loss = ops.hinge_loss(similarity, margin=1.0, hardest=hardest)
    (gradient,) = torch.autograd.grad(loss, similarity)
    # Exactly at the margin: 0, without a gradient. The second image has two captions at 1: both, or one of them.
    assert loss.item() == 4.0 - hardest
    assert gradient[0, 1] == gradient[0, 2] == gradient[2, 0] == gradient[2, 1] == 0
    assert float(gradient.diagonal().sum()) == -loss.item()
    assert float(gradient.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@hardest_or_all
def test_half_precision(dtype, hardest):
    similarity = torch.randn(7, 7).to(dtype).requires_grad_()
    loss = ops.hinge_loss(similarity, hardest=hardest)
    expected, gradient = by_loops(similarity.detach().double(), (None, None), 0.2, hardest)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, similarity)[0], gradient.to(dtype))


@hardest_or_all
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_nan_shows(hardest, place):
    similarity = torch.zeros(3, 3)
    similarity[place] = torch.nan
    assert ops.hinge_loss(similarity, hardest=hardest).isnan()


@pytest.mark.parametrize("layout", [lambda x: x.T, lambda x: x[::2, ::2], lambda x: x[:1].expand(8, 8)])
@hardest_or_all
def test_any_layout(layout, hardest):
    similarity = layout(torch.randn(8, 8, dtype=torch.float64))
    leaf = similarity.clone().requires_grad_()
    loss = ops.hinge_loss(leaf, hardest=hardest)
    assert loss.item() == pytest.approx(by_loops(similarity, (None, None), 0.2, hardest)[0])
    assert ops.hinge_loss(similarity, hardest=hardest).item() == loss.item()


BAD = {
    "rectangle": ((torch.zeros(2, 3),), ValueError, r"\(2, 3\)"),
    "vector": ((torch.zeros(3),), ValueError, r"\(3,\)"),
    "integers": ((torch.zeros(2, 2).long(),), TypeError, "similarity has dtype"),
    "one side": ((torch.zeros(2, 2), torch.zeros(2).long()), ValueError, "go together"),
    "too few ids": ((torch.zeros(2, 2), *map(torch.arange, (2, 1))), ValueError, r"text_ids .*\(1,\)"),
    "float ids": ((torch.zeros(2, 2), torch.zeros(2), torch.zeros(2).long()), TypeError, "image_ids .*float32"),
    "device": ((torch.zeros(2, 2), *2 * [torch.zeros(2, device="meta").long()]), ValueError, "image_ids lies on meta"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.hinge_loss(*arguments)


# Regions and words


def region_word_case(n, dtype=torch.float64):
    regions, words, width = 4, 6, 10
    units = [torch.randn(n, regions, width, dtype=dtype), torch.randn(n, words, width, dtype=dtype)]
    lengths = torch.randint(1, words + 1, (n,)), torch.randint(1, regions + 1, (n,))
    for x, real in zip(units, lengths[::-1], strict=True):
        x[torch.arange(x.shape[1]) >= real[:, None]] = torch.nan
    smooth = torch.tensor(9.0, dtype=dtype)
    return [t.requires_grad_() for t in (*units, smooth)], lengths


@pytest.mark.parametrize("gathered", [1 << 25, 1])
@pytest.mark.parametrize("n", [1, 7])
@hardest_or_all
@some_ids
def test_of_regions_and_words(monkeypatch, gathered, n, hardest, ids):
    monkeypatch.setitem(blocked.region_word_pairs.GATHERED_BYTES, "cpu", gathered)
    tensors, lengths = region_word_case(n)
    image_ids, text_ids = ids(n)
    options = {"image_ids": image_ids, "text_ids": text_ids, "margin": 0.5, "hardest": hardest}
    loss = ops.region_word_hinge_loss(*tensors, *lengths, **options)
    similarity = reference.region_word.region_word_similarity(*tensors, *lengths)
    expected = reference.hinge.hinge_loss(similarity, image_ids, text_ids, margin=0.5, hardest=hardest)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    gradients = torch.autograd.grad(loss, tensors)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        if wanted.any():
            assert relative_error(actual, wanted) < 1e-8
        else:
            assert not actual.any()
    with torch.no_grad():
        assert float(ops.region_word_hinge_loss(*tensors, *lengths, **options)) == pytest.approx(loss.item())


@hardest_or_all
def test_of_no_regions_and_words(hardest):
    tensors, lengths = region_word_case(0)
    loss = ops.region_word_hinge_loss(*tensors, *lengths, hardest=hardest)
    assert loss.item() == 0
    loss.backward()


def test_only_the_hardest_pairs_are_differentiated(monkeypatch):
    calls = []
    monkeypatch.setattr(blocked.region_word, "_backward", lambda *_: calls.append(1))
    tensors, lengths = region_word_case(5, torch.float32)
    ops.region_word_hinge_loss(*tensors, *lengths, hardest=True).backward()
    assert not calls
    assert all(t.grad.isfinite().all() for t in tensors)


def test_region_word_errors():
    tensors, lengths = region_word_case(3)
    with pytest.raises(ValueError, match="2 images and 3 captions"):
        ops.region_word_hinge_loss(tensors[0][:2], *tensors[1:], lengths[0])
    with pytest.raises(ValueError, match="go together"):
        ops.region_word_hinge_loss(*tensors, *lengths, image_ids=torch.arange(3))
    with pytest.raises(ValueError, match="caption 0 has no words"):
        ops.region_word_hinge_loss(*tensors, 0 * lengths[0])
