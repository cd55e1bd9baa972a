import pytest
import torch

from esl_fast.kernels.ranks import retrieval_ranks
from esl_fast.reference.ranks import retrieval_ranks as reference


def units(n, width, device, seed=0):
    """Small integers: products are exact and tie often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (n, width), generator=generator).float().to(device)


def owners_of(m, n, device, seed=0):
    return torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize(
    ("n", "m", "width"), [(1, 1, 3), (1, 131, 9), (70, 1, 9), (33, 165, 9), (131, 70, 33), (97, 300, 4), (300, 64, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_definition(n, m, width, dtype, device, poison):
    a, b, owners = units(n, width, device).to(dtype), units(m, width, device, 1).to(dtype), owners_of(m, n, device)
    expected = reference(a.float() @ b.float().mT, owners)
    for order in (torch.arange(m, device=device), owners.argsort(stable=True)):
        image, text = retrieval_ranks(a, b[order], owners[order])
        assert image.dtype == text.dtype == torch.int64
        assert torch.equal(image, expected[0])
        assert torch.equal(text, expected[1][order])


def test_five_captions_an_image_at_full_width(device):
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.randn(60, 1022, generator=generator), torch.randn(300, 1022, generator=generator)
    a, b = a.to(device), (a.repeat_interleave(5, 0) + 12 * noise).to(device)
    owners = torch.arange(300, device=device) // 5
    image, text = retrieval_ranks(a, b, owners)
    expected = reference(a.double() @ b.double().mT, owners)
    assert torch.equal(image, expected[0])
    assert torch.equal(text, expected[1])
    assert 0 < (text == 0).sum() < 300


def test_a_constant_matrix_ranks_last(device):
    image, text = retrieval_ranks(
        torch.ones(70, 9, device=device), torch.ones(140, 9, device=device), torch.arange(140, device=device) // 2
    )
    assert (image == 139).all()
    assert (text == 69).all()


def test_images_without_captions_rank_m(device):
    a, b = units(70, 9, device), units(10, 9, device, 1)
    image, _ = retrieval_ranks(a, b, torch.full((10,), 69, device=device))
    assert (image[:69] == 10).all()
    assert image[69] < 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["image", "text"])
def test_what_is_broken_does_not_pass_for_good(bad, side, device):
    a, b, owners = units(40, 9, device), units(130, 9, device, 1), owners_of(130, 40, device)
    a[:, 0] = b[:, 0] = 1
    (a if side == "image" else b)[7, 0] = bad
    image, text = retrieval_ranks(a, b, owners)
    scores = a @ b.mT
    hit = owners == 7 if side == "image" else torch.arange(130, device=device) == 7
    expected = reference(scores.nan_to_num(torch.inf, torch.inf, -torch.inf), owners)
    # Without a finite score for its right answer an item is last; all else is by the definition.
    assert (text[hit] == 39).all()
    assert torch.equal(text[~hit], expected[1][~hit])
    if side == "image":
        assert image[7] == 129
        assert torch.equal(image[torch.arange(40) != 7], expected[0][torch.arange(40) != 7])
    else:
        own = torch.arange(40, device=device) == owners[7]
        assert torch.equal(image[~own], expected[0][~own])
        others = [scores[owners[7], j] for j in range(130) if j != 7 and owners[j] == owners[7]]
        assert image[own] == ((scores[owners[7]].nan_to_num(torch.inf) >= max(others)).sum() - 1 if others else 129)


def test_everything_nan_ranks_last(device):
    a, b = torch.full((33, 9), torch.nan, device=device), units(70, 9, device)
    image, text = retrieval_ranks(a, b, owners_of(70, 33, device))
    assert ((image == 69) | (image == 70)).all()
    assert (text == 32).all()


@pytest.mark.parametrize("owner", [-1, 40, 2**40])
def test_an_owner_that_is_no_image_is_never_reached(owner, device):
    a, b, owners = units(40, 9, device), units(130, 9, device, 1), owners_of(130, 40, device)
    expected = reference(a @ b.mT, owners)
    broken = owners.clone()
    broken[7] = owner
    image, text = retrieval_ranks(a, b, broken)
    assert text[7] == 39
    rest = torch.arange(130, device=device) != 7
    assert torch.equal(text[rest], expected[1][rest])
    others = torch.arange(40, device=device) != owners[7]
    assert torch.equal(image[others], expected[0][others])


def test_strides(device):
    a, b, owners = units(80, 20, device)[::2, ::2], units(10, 130, device, 1).mT, owners_of(260, 40, device)[::2]
    assert all(map(torch.equal, retrieval_ranks(a, b, owners), reference(a @ b.mT, owners)))


def test_rows_beyond_int32(device):
    stride = 2**29 + 3
    a = torch.empty(8 * stride, dtype=torch.float16, device=device).as_strided((8, 9), (stride, 1))
    a.copy_(units(8, 9, device))
    b, owners = units(30, 9, device, 1).half(), owners_of(30, 8, device)
    assert all(map(torch.equal, retrieval_ranks(a, b, owners), reference(a.float() @ b.float().mT, owners)))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (5, 0)])
def test_empty(n, m, device):
    image, text = retrieval_ranks(units(n, 3, device), units(m, 3, device), owners_of(m, max(n, 1), device))
    assert image.shape == (n,)
    assert text.shape == (m,)


def test_registration(device):
    args = units(5, 7, device), units(9, 7, device, 1), owners_of(9, 5, device)
    torch.library.opcheck(retrieval_ranks.registered, args)
    compiled = torch.compile(lambda *x: retrieval_ranks(*x)[0] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), retrieval_ranks(*args)[0] + 1)
