import warnings

import pytest
import torch
from helpers import golden_files, load_golden, relative_error

from esl_fast.kernels import region_word as kernel
from esl_fast.reference import region_word as reference

pytestmark = pytest.mark.usefixtures("poison")
GOLDEN = [pytest.param(path, id=path.stem) for path in golden_files("region_word_*.safetensors")]
# images, regions, captions, words, units
SIZES = [(5, 7, 2, 9, 40), (17, 3, 2, 6, 33), (2, 36, 1, 20, 70), (1, 1, 1, 1, 16), (2, 3, 2, 128, 30)]
SIZES += [(3, 13, 1, 3, 511)]


@pytest.fixture(autouse=True)
def quiet_interpreter():
    # Lanes without an image divide by zero; what they hold is not stored.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def case(sizes, device, dtype=torch.float32, *, padded_regions=False, smooth=14.3):
    """Units whose padding is NaN, the same in float64 as leaves, lengths."""
    n, regions, m, words, width = sizes
    region_units = torch.nn.functional.normalize(torch.randn(n, regions, width), dim=-1)
    word_units = 2 * torch.nn.functional.normalize(torch.randn(m, words, width), dim=-1)
    word_lengths = torch.randint(1, words + 1, (m,))
    word_lengths[:1] = words
    region_lengths = torch.randint(1, regions + 1, (n,)) if padded_regions else None
    word_units[torch.arange(words) >= word_lengths[:, None]] = torch.nan
    if padded_regions:
        region_units[torch.arange(regions) >= region_lengths[:, None]] = torch.nan
    units = [region_units.to(device, dtype), word_units.to(device, dtype)]
    tensors = [*units, torch.tensor(smooth, device=device)]
    exact = [t.double().cpu().requires_grad_() for t in tensors]
    return [t.requires_grad_() for t in tensors], exact, word_lengths, region_lengths


def both(scores, expected, tensors, exact):
    """Gradients of one random weighting of the scores and of the expected scores."""
    grad = torch.randn_like(expected)
    return (
        torch.autograd.grad((scores * grad.to(scores)).sum(), tensors),
        torch.autograd.grad((expected * grad).sum(), exact),
    )


def assert_gradients(actual, expected, tolerance, smooth_tolerance):
    for got, want in zip(actual[:2], expected[:2], strict=True):
        assert (got.double().cpu() - want).norm() <= tolerance * want.norm()
        assert not got.isnan().any()
    # Contributions to the gradient of smooth cancel: what remains is compared with their size.
    assert abs(float(actual[2]) - float(expected[2])) <= smooth_tolerance * max(abs(float(expected[2])), 0.1)


def layouts(word_lengths, words, device):
    """Packed, and as lengths on a GPU are taken: every caption with all its padding."""
    m = len(word_lengths)
    start = torch.arange(m, device=device) * words
    lengths = word_lengths.int().to(device)
    padded = kernel.Packing(torch.arange(m, device=device), lengths, start, torch.arange(m * words, device=device), [])
    return {"packed": kernel.pack_captions(word_lengths, words, device), "padded": padded}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("padded_regions", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_fp32(sizes, padded_regions, layout, device):
    tensors, exact, word_lengths, region_lengths = case(sizes, device, padded_regions=padded_regions)
    packing = layouts(word_lengths, sizes[3], device)[layout]
    expected = reference.region_word_similarity(*exact, word_lengths, region_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths, region_lengths, packing=packing)
    assert scores.dtype == torch.float32
    assert relative_error(scores.cpu(), expected) < 1e-6
    assert_gradients(*both(scores, expected, tensors, exact), 1e-5, 2e-5)


@pytest.mark.parametrize("smooth", [0.0, 63.0, 65.0, 1000.0])
def test_smooth(smooth, device):
    tensors, exact, word_lengths, region_lengths = case((3, 5, 2, 9, 20), device, padded_regions=True, smooth=smooth)
    expected = reference.region_word_similarity(*exact, word_lengths, region_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths, region_lengths)
    assert relative_error(scores.cpu(), expected) < 1e-6 * max(1, smooth / 10)
    assert_gradients(*both(scores, expected, tensors, exact), 1e-5 * max(1, smooth / 10), 1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_small_and_negative_products(sign, device):
    """All products tiny (tanh must keep their digits) or all negative (softmaxes of one sign)."""
    tensors, exact, word_lengths, _ = case((3, 5, 2, 9, 20), device)
    with torch.no_grad():
        for units in (tensors, exact):
            units[0].abs_()
            units[1].abs_().mul_(1e-4 * sign)
    expected = reference.region_word_similarity(*exact, word_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths)
    assert relative_error(scores.cpu(), expected) < 2e-6
    assert_gradients(*both(scores, expected, tensors, exact), 1e-5, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)], ids=str)
def test_zero_products(dtype, tolerance, device):
    """Norms of 0 on both axes: even attention, and no gradient through them, as in torch."""
    tensors, exact, word_lengths, _ = case((2, 3, 2, 4, 8), device, dtype)
    with torch.no_grad():
        for units in (tensors, exact):
            units[0][0].zero_()
            units[1][0, 1].zero_()
    expected = reference.region_word_similarity(*exact, word_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths)
    assert relative_error(scores.cpu(), expected) < tolerance
    if dtype == torch.float32:  # of vectors of zeros they are beyond float16
        actual = torch.autograd.grad(scores.sum(), tensors)
        assert all(torch.isfinite(g).all() for g in actual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype, device):
    if dtype is torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no bfloat16 stores")
    tensors, exact, word_lengths, _ = case((5, 20, 2, 13, 300), device, dtype)
    expected = reference.region_word_similarity(*exact, word_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths)
    naive_leaves = [t.detach().clone().requires_grad_() for t in tensors]
    naive_leaves[2] = naive_leaves[2].detach().to(dtype).requires_grad_()
    naive = reference.region_word_similarity(*naive_leaves, word_lengths)
    assert relative_error(scores.cpu(), expected) <= relative_error(naive.cpu(), expected)
    actual, wanted = both(scores, expected, tensors, exact)
    theirs, again = both(naive, reference.region_word_similarity(*exact, word_lengths), naive_leaves, exact)
    for got, want, naive_got, naive_want in zip(actual[:2], wanted, theirs, again, strict=False):
        real = want != 0
        error = (got.double().cpu() - want)[real].norm() / want[real].norm()
        naive_error = (naive_got.double().cpu() - naive_want)[real].norm() / naive_want[real].norm()
        assert error < {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert not error > naive_error  # which may be NaN: eps is 0 in float16


@pytest.mark.parametrize("path", GOLDEN)
def test_golden_units(path, device):
    """Official units through the kernel against the definition; with real, strongly correlated, words and regions."""
    _, golden = load_golden(path)
    golden = {name: golden[name][:2] for name in ("image_units", "text_units", "text_lengths")}
    units = [golden["image_units"].to(device), golden["text_units"].to(device), torch.tensor(22.0, device=device)]
    tensors = [t.requires_grad_() for t in units]
    exact = [t.detach().double().cpu().requires_grad_() for t in units]
    expected = reference.region_word_similarity(*exact, golden["text_lengths"])
    scores = kernel.region_word_similarity(*tensors, golden["text_lengths"])
    assert relative_error(scores.cpu(), expected) < 1e-6
    assert_gradients(*both(scores, expected, tensors, exact), 1e-5, 1e-4)


@pytest.mark.parametrize(("regions", "words"), [(5, 1), (1, 5)])
def test_gradients_of_lone_units(regions, words, device):
    tensors, exact, word_lengths, _ = case((6, regions, 7, words, 40), device)
    for units in (tensors[1], exact[1]):
        units.data.mul_(1e-2)
    scores = kernel.region_word_similarity(*tensors, word_lengths)
    actual, wanted = both(scores, reference.region_word_similarity(*exact, word_lengths), tensors, exact)
    for got, want in zip(actual[:2], wanted, strict=False):
        assert relative_error(got.cpu(), want) < 2e-6


@pytest.mark.parametrize("empty", ["images", "captions"])
def test_empty(empty, device):
    n, m = (0, 3) if empty == "images" else (3, 0)
    regions = torch.randn(n, 4, 6, device=device, requires_grad=True)
    words = torch.randn(m, 5, 6, device=device, requires_grad=True)
    smooth = torch.tensor(3.0, device=device, requires_grad=True)
    scores = kernel.region_word_similarity(regions, words, smooth, torch.full((m,), 2))
    assert scores.shape == (n, m)
    scores.sum().backward()
    assert not any(t.grad.any() for t in (regions, words, smooth))


def test_strides(device):
    tensors, _, word_lengths, _ = case((6, 8, 6, 9, 40), device)
    cut = [tensors[0].detach()[::2, 1:7, 3:], tensors[1].detach()[1::2, :, 3:], tensors[2].detach()]
    lengths = word_lengths[1::2]
    expected = reference.region_word_similarity(*(t.double().cpu() for t in cut), lengths)
    assert relative_error(kernel.region_word_similarity(*cut, lengths).cpu(), expected) < 1e-6
    region_lengths = torch.stack([torch.tensor([6, 2, 3]), torch.full((3,), 9)], 1)[:, 0]
    for given in (region_lengths, torch.tensor([4]).expand(3)):
        expected = reference.region_word_similarity(*(t.double().cpu() for t in cut), lengths, given)
        scores = kernel.region_word_similarity(*cut, lengths, given.to(device))
        assert relative_error(scores.cpu(), expected) < 1e-6
    expected = reference.region_word_similarity(*(t.double().cpu() for t in cut), lengths)
    major = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in cut[:2]]
    assert relative_error(kernel.region_word_similarity(*major, cut[2], lengths).cpu(), expected) < 1e-6


def test_gradient_strides(device):
    tensors, exact, word_lengths, _ = case((3, 4, 5, 6, 20), device)
    for t in (tensors, exact):
        scores = (
            kernel.region_word_similarity(*t, word_lengths)
            if t is tensors
            else reference.region_word_similarity(*t, word_lengths)
        )
        scores.T.contiguous().T.backward(torch.ones(5, 3, device=t[0].device, dtype=scores.dtype).T)
    assert_gradients([t.grad for t in tensors], [t.grad for t in exact], 1e-5, 2e-5)


def test_many_blocks(device, monkeypatch):
    """Several blocks of images and captions, forward and backward, whose last ones are smaller."""
    monkeypatch.setattr(kernel, "BLOCK_IMAGES", 3)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 4 * 20 * 3 * 2)
    monkeypatch.setattr(kernel, "MAX_WORDS", 10)
    tensors, exact, word_lengths, _ = case((4, 2, 12, 9, 12), device)
    monkeypatch.setattr(kernel, "GRADIENT_BYTES", 4 * int(word_lengths.sum()) * 2 * 2)
    expected = reference.region_word_similarity(*exact, word_lengths)
    scores = kernel.region_word_similarity(*tensors, word_lengths)
    assert relative_error(scores.cpu(), expected) < 1e-6
    assert_gradients(*both(scores, expected, tensors, exact), 1e-5, 2e-5)


def test_caption_blocks():
    lengths = torch.tensor([3, 17, 8, 9, 16, 128, 1, 20, 20, 20, 33])
    packing = kernel.pack_captions(lengths, 128, torch.device("cpu"))
    blocks = kernel.caption_blocks(packing, 128, 45)
    assert [(b.words, b.count, b.rows) for b in blocks] == [
        (8, 3, 12), (16, 2, 25), (32, 2, 37), (32, 2, 40), (64, 1, 33), (128, 1, 128),
    ]  # fmt: skip
    assert [b.row for b in blocks] == [0, 12, 37, 74, 114, 147]
    assert packing.rows.numel() == int(lengths.sum())


def test_padding_changes_nothing(device):
    tensors, _, word_lengths, region_lengths = case((4, 5, 6, 9, 20), device, padded_regions=True)
    other = [torch.where(t.isnan(), 7.0, t).detach().requires_grad_() for t in tensors]
    scores, same = (kernel.region_word_similarity(*t, word_lengths, region_lengths) for t in (tensors, other))
    assert torch.equal(scores, same)
    grads = [torch.autograd.grad(s.square().sum(), t) for s, t in ((scores, tensors), (same, other))]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_deterministic(device):
    tensors, _, word_lengths, _ = case((5, 7, 4, 9, 40), device)
    runs = []
    for _ in range(2):
        scores = kernel.region_word_similarity(*tensors, word_lengths)
        runs.append((scores, *torch.autograd.grad(scores.square().sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


SUBSETS = [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]


@pytest.mark.parametrize("wanted", SUBSETS)
def test_subsets_of_gradients(wanted, device):
    tensors, exact, word_lengths, _ = case((3, 4, 3, 6, 20), device)
    inputs = [t if w else t.detach() for t, w in zip(tensors, wanted, strict=True)]
    chosen = [t for t, w in zip(tensors, wanted, strict=True) if w]
    scores = kernel.region_word_similarity(*inputs, word_lengths)
    expected = reference.region_word_similarity(*exact, word_lengths)
    actual = torch.autograd.grad(scores.sum(), chosen)
    theirs = torch.autograd.grad(expected.sum(), [e for e, w in zip(exact, wanted, strict=True) if w])
    for got, want in zip(actual, theirs, strict=True):
        assert (got.double().cpu() - want).norm() <= 2e-5 * max(want.norm(), 0.1)


def test_opcheck(device):
    tensors, _, word_lengths, region_lengths = case((2, 3, 3, 4, 8), device, padded_regions=True)
    clean = [t.detach().nan_to_num().requires_grad_() for t in tensors]
    packing = kernel.pack_captions(word_lengths, 4, device)
    torch.library.opcheck(kernel._forward.registered, (*clean, region_lengths.to(device), *packing))


def test_far_apart(device):
    """A score matrix whose rows lie more than 2^31 elements apart."""
    if device.type == "cuda":
        pytest.skip("would touch gigabytes")
    far = 2**31 + 8
    tensors, exact, word_lengths, _ = case((3, 2, 3, 4, 8), device)
    storage = torch.UntypedStorage(4 * (2 * far + 64))  # virtual: few pages of it are touched
    wide = torch.tensor([], dtype=torch.float32).set_(storage, 0, (3, 3), (far, 1))
    packing = kernel.pack_captions(word_lengths, 4, device)
    blocks = kernel.caption_blocks(packing, 4, 128)
    columns = tensors[0].detach().transpose(0, 1).reshape(-1, 8)
    for block in blocks:
        rows = packing.rows[block.row : block.row + block.rows]
        products = kernel._gather(tensors[1].detach(), rows)[:, :8] @ columns.mT
        # With room behind, where a lane without an image reads.
        products = torch.cat([products.view(-1), products.new_zeros(8)])[: products.numel()].view(products.shape)
        kernel._reduce[(block.count,)](
            products, tensors[2].detach(), packing.order, packing.lengths, packing.offsets, None, wide, far, 1,
            3, 2, 0, block.first, 1, 6, WORDS=block.words, IMAGES=4, LENGTHS=False, EXACT=True,
        )  # fmt: skip
    assert relative_error(wide, reference.region_word_similarity(*exact, word_lengths)) < 1e-6
