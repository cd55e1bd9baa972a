import sys

import pytest
import torch

import esl_fast
from esl_fast.kernels import topk as kernel
from esl_fast.kernels.topk import topk, topk_stream, topk_update
from esl_fast.reference.topk import topk as reference


def units(n, width, device, seed=0):
    """Small integers: products are exact and tie often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (n, width), generator=generator).float().to(device)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0].float())
    assert torch.equal(found[1], expected[1])
    assert found[1].dtype == torch.int64


@pytest.mark.parametrize(
    ("queries", "gallery", "width", "k"),
    [(1, 1, 3, 1), (3, 131, 9, 10), (5, 129, 4, 128), (2, 300, 9, 300), (67, 140, 33, 3), (2, 64, 2, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_definition(queries, gallery, width, k, dtype, device, poison):
    a, b = units(queries, width, device).to(dtype), units(gallery, width, device, 1).to(dtype)
    assert_same(topk(a, b, k), reference(a.float() @ b.float().mT, k))


def test_bfloat16_is_compared_in_float32(device):
    a = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16, device=device)
    b = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16, device=device)
    assert topk(a, b, 2)[1].tolist() == [[1, 0]]


def test_what_is_not_finite(device):
    a = torch.ones(1, 1, device=device)
    scores = torch.tensor([torch.nan, -1, -torch.inf, torch.inf, -0.0, 0.0, -1], device=device)
    assert_same(topk(a, scores[:, None], 7), reference(scores[None], 7))


def test_all_ties_come_in_order(device):
    _, indices = topk(torch.ones(3, 5, device=device), torch.ones(300, 5, device=device), 20)
    assert torch.equal(indices, torch.arange(20, device=device).expand(3, 20))


def test_rising_scores_replace_everything(device):
    gallery = torch.arange(300.0, device=device)[:, None]
    values, indices = topk(torch.ones(2, 1, device=device), gallery, 40)
    assert indices[1].tolist() == list(range(299, 259, -1))
    assert torch.equal(values, indices.float())


@pytest.mark.parametrize("block", [1, 50, 128, 1000])
def test_stream_of_a_host_tensor(block, device, monkeypatch):
    monkeypatch.setattr(kernel, "STREAM_BLOCK", block)
    a, b = units(9, 9, device), units(301 if block > 1 else 9, 9, torch.device("cpu"), 1)
    assert_same(topk_stream(a, b, 5), reference(a @ b.to(device).mT, 5))


def test_blocks_in_any_order_far_into_a_gallery(device):
    a, b, start = units(9, 9, device), units(301, 9, device, 1), 2**31 - 150
    keys = kernel._first_keys(9, 20, device)
    for first, last in ((200, 301), (0, 7), (7, 7), (7, 200)):
        topk_update(keys, a, b[first:last], start + first)
    values, indices = reference(a @ b.mT, 20)
    assert_same(kernel._decode(keys), (values, indices + start))


def test_rows_beyond_int32(device):
    stride = 2**29 + 3
    b = torch.empty(8 * stride, dtype=torch.float16, device=device).as_strided((8, 9), (stride, 1))
    b.copy_(units(8, 9, device))
    a = units(5, 9, device, 1).half()
    assert_same(topk(a, b, 3), reference(a.float() @ b.float().mT, 3))


def test_empty(device):
    values, indices = topk(units(0, 3, device), units(4, 3, device), 2)
    assert values.shape == indices.shape == (0, 2)


def test_registration(device):
    keys = torch.arange(6, device=device).view(2, 3) + torch.iinfo(torch.int64).min
    torch.library.opcheck(topk_update.registered, (keys, units(2, 7, device), units(9, 7, device, 1), 0))



def test_gallery_of_lower_precision(device):
    queries, gallery = 1e5 * units(5, 20, device), units(300, 20, device, 1).half()
    with esl_fast.use_backend("triton"):
        found = esl_fast.topk(queries, gallery, 9)
    assert_same(found, reference(queries @ gallery.float().mT, 9))


def test_more_than_the_kernel_keeps(device, monkeypatch):
    monkeypatch.setattr(sys.modules["esl_fast.ops.topk"], "MOST", 4)
    for name in ("topk", "topk_stream"):
        monkeypatch.setattr(kernel, name, lambda *args: pytest.fail("keeps too many"))
    queries, gallery = units(9, 5, device), units(40, 5, device, 1)
    expected = reference(queries @ gallery.mT, 5)
    assert all(map(torch.equal, esl_fast.topk(queries, gallery, 5), expected))
    with pytest.raises(ValueError, match="k is True"):
        esl_fast.topk(queries, gallery, True)
