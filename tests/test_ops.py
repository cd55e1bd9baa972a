"""The public ops: the blocked path against the definition, edge cases, errors."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from helpers import AGGREGATORS, relative_error

import esl_fast
from esl_fast import blocked, ops, reference
from esl_fast._autocast import without_autocast
from esl_fast.kernels._common import INTERPRETING

CHAINS = ("normalized", "raw")
chains = pytest.mark.parametrize("chain", CHAINS)


def random_taps(levels, size=2):
    return torch.randn(levels, size, generator=torch.Generator().manual_seed(0))


def random_matrices(*dims):
    """The same wherever they are drawn, as parameters of tests are while others are collected."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(after, before, generator=generator) for before, after in pairwise(dims)]


def defined(x, weights, **options):
    """Units by the definition, in float64."""
    if isinstance(weights, torch.Tensor):
        levels = weights.double().unbind()
    else:
        levels = [reference.aggregate.select_top2(weight.double()) for weight in weights]
    return reference.aggregate.aggregate(x.double(), levels, **options)


# Aggregation


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ([3.0, -9.0, 1.0, 2.0], [1, 0, 0, 1]),  # signed: a large negative entry is not among the largest
        ([1.0, 2.0, 2.0, 2.0], [0, 1, 1, 1]),  # a tie with the second keeps more than two
        ([5.0, 1.0, 1.0, 0.0], [1, 1, 1, 0]),
        ([2.0, 2.0, 2.0, 2.0], [1, 1, 1, 1]),
        ([-1.0, -2.0, -3.0, -4.0], [1, 1, 0, 0]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
        ([-7.0], [1]),
        ([4.0, -4.0], [1, 1]),
    ],
)
def test_which_entries_a_row_keeps(row, kept):
    weight = torch.tensor([row])
    selected = reference.aggregate.select_top2(weight)
    torch.testing.assert_close(selected, weight / (weight.norm() + 1e-8) * torch.tensor([kept]))
    assert torch.equal(blocked.aggregate.compressed(selected).to_dense(), selected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_that_is_not_finite_shows(bad, grad):
    weights = random_matrices(8, 4, 2)
    weights[1][0, 2] = bad
    units = ops.aggregate(torch.randn(3, 8, requires_grad=grad), weights, chain="raw")
    assert units[:, 12:].isnan().all()
    assert units[:, :12].isfinite().all()


WEIGHTS = {
    "taps": lambda: random_taps(5),
    "wide taps": lambda: random_taps(2, 5),
    "one tap": lambda: random_taps(3, 1),
    "no taps": lambda: random_taps(0),
    "tiny taps": lambda: 1e-7 * random_taps(5),
    "taps of many sizes": lambda: 10.0 ** torch.arange(-4, 5, 2)[:, None] * random_taps(5),
    "zero taps": lambda: random_taps(5) * torch.tensor([1, 1, 0, 1, 1])[:, None],
    "zero first taps": lambda: random_taps(6) * torch.tensor([0, 1, 1, 1, 1, 1])[:, None],
    "huge taps": lambda: 1e30 * random_taps(5),
    "matrices": lambda: random_matrices(67, 33, 16, 8, 4),
    "matrices down to one entry": lambda: random_matrices(67, 2, 1, 1),
    "matrices upwards": lambda: random_matrices(67, 90, 5),
    "no matrices": lambda: [],
    "constant rows": lambda: [torch.ones(33, 67), torch.full((16, 33), -2.0)],
    "whole numbers": lambda: [torch.randint(-2, 3, w.shape).float() for w in random_matrices(67, 33, 16)],
    "tiny matrices": lambda: [1e-12 * w for w in random_matrices(67, 33, 33, 33, 33, 16, 8)],
    "a zero matrix": lambda: [torch.zeros(33, 67), *random_matrices(33, 33, 33, 33, 33, 16)],
    "zero rows": lambda: [torch.zeros(33, 67), *random_matrices(33, 16)],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("rows", [0, 1, 4, 11])
@pytest.mark.parametrize("normalize", [True, False])
@chains
def test_blocked_aggregate(monkeypatch, weights, rows, normalize, chain):
    monkeypatch.setattr(blocked.aggregate, "BLOCK", 4)
    weights, x = weights(), 3 * torch.randn(rows, 67)
    units = ops.aggregate(x, weights, chain=chain, normalize=normalize)
    assert units.dtype == torch.float32
    torch.testing.assert_close(units.double(), defined(x, weights, chain=chain, normalize=normalize), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("weights", [random_taps(5), random_matrices(67, 33, 16, 8)], ids=AGGREGATORS)
@chains
def test_embeddings_of_any_size(scale, weights, chain):
    x = scale * torch.randn(5, 67)
    units = ops.aggregate(x, weights, chain=chain)
    torch.testing.assert_close(units.double(), defined(x, weights, chain=chain), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ratio", [0.1, 0.01, 1e-3, 1e-12])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("normalize", [True, False])
@chains
def test_levels_that_all_but_vanish(ratio, aggregator, normalize, chain):
    """Each level of one vector is `ratio` times as long as its predecessor; the others keep their lengths."""
    taps = torch.tensor([[1, ratio]]).repeat(8, 1)
    matrices = [torch.kron(torch.eye(256 >> k), torch.tensor([[1, ratio]])) for k in range(8)]
    weights = taps if aggregator == "heuristic" else matrices
    x = torch.randn(5, 512)
    x[[1, 3]] = torch.eye(512)[[511, 511]]
    x[3] *= 1e-12
    x[4] = 0 if not normalize else x[4]
    units = ops.aggregate(x, weights, chain=chain, normalize=normalize)
    expected = defined(x, weights, chain=chain, normalize=normalize)
    error = (units.double() - expected).abs().amax(1)
    assert error[[0, 1, 2, 4]].max() < 2e-6
    assert error[3] < 2e-6 or not normalize  # of which the definition in float32 is no better


@pytest.mark.parametrize("weights", [random_taps(8), random_matrices(*(512 >> k for k in range(9)))], ids=AGGREGATORS)
@pytest.mark.parametrize("scale", [0, 1e-23])
@chains
def test_vectors_of_zeros_stay_zeros(weights, chain, scale):
    x = torch.randn(3, 512)
    x[1] = scale * torch.eye(512)[0]
    units = ops.aggregate(x, weights, chain=chain, normalize=False)
    expected = defined(x, weights, chain=chain, normalize=False)
    torch.testing.assert_close(units[::2].double(), expected[::2], rtol=0, atol=2e-6)
    assert units[1].norm() <= (1 if scale else 0)  # too small to have a norm; at least never longer than units


@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
def test_blocks_in_another_thread(weights):
    weights = copy.deepcopy(weights)
    parameters = [w.requires_grad_() for w in ([weights] if isinstance(weights, torch.Tensor) else weights)]
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = defined(x, weights, chain="raw")
        of_block = ops.block_units(weights, torch.float32, chain="raw")
        for weight in parameters:
            weight.mul_(-3).add_(1)
    with ThreadPoolExecutor(1) as pool:  # threads begin with gradients
        found = pool.submit(of_block, x).result()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_coarse_products_leave_embeddings_as_they_are():
    x = torch.randn(300, 512)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        units = ops.aggregate(x, random_matrices(512, 256), chain="raw")
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(units[:, :512], torch.nn.functional.normalize(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
def test_the_default_device_is_not_asked(weights):
    x = torch.randn(5, 64)
    with torch.device("meta"):
        units = ops.aggregate(x, weights, chain="raw")
    torch.testing.assert_close(units.double(), defined(x, weights, chain="raw"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
def test_little_memory_is_kept(monkeypatch, weights):
    monkeypatch.setattr(blocked.aggregate, "BLOCK", 8)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: sizes.append(size) or empty(size, **options))
    of_block = ops.block_units(weights, torch.float32, chain="raw")
    first, second = torch.randn(2, 83, 64)
    kept = of_block(first)
    of_block(second)
    torch.testing.assert_close(kept.double(), defined(first, weights, chain="raw"), rtol=0, atol=2e-6)
    assert len(sizes) <= 2
    assert max(sizes) < 8 * 4 * 64


@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
def test_blocks_in_every_mode(weights):
    of_block, x = ops.block_units(weights, torch.float32, chain="normalized"), torch.randn(5, 64)
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode]
    found = []
    for mode in modes:
        with mode():
            found.append(of_block(x).clone())
    assert all(torch.equal(found[0], units) for units in found)


@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
def test_units_of_blocks_last_until_the_next(weights):
    of_block = ops.block_units(weights, torch.float32, chain="raw")
    for rows in (7, 7, 3, 20, 7, 5, 4, 2, 1, 0, 7):  # more sizes than are kept, growing and shrinking
        of_block(torch.full((rows, 64), torch.nan))  # what is left must not show
        x = torch.randn(rows, 64)
        torch.testing.assert_close(of_block(x).double(), defined(x, weights, chain="raw"), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64), torch.randn(2, 3, 64), torch.randn(2, 0, 64), torch.randn(0, 64), torch.randn(64, 7).T,
        torch.randn(5, 128)[:, ::2], torch.randn(1, 64).expand(6, 64), torch.randn(3, 64, 2).mT,
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)  # fmt: skip
@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
@pytest.mark.parametrize("grad", [False, True])
def test_aggregate_any_layout(x, weights, grad):
    leaf = x.clone().requires_grad_(grad)
    units = ops.aggregate(leaf if grad else x, weights, chain="raw")
    assert units.shape == (*x.shape[:-1], 64 + 32 + 16 + 8)
    torch.testing.assert_close(units.double(), defined(x, weights, chain="raw"), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str
)
@pytest.mark.parametrize("weights", [random_taps(3), random_matrices(64, 32, 16, 8)], ids=AGGREGATORS)
@chains
def test_aggregate_dtypes(weights, chain, dtype, tolerance):
    x = torch.randn(9, 64).to(dtype)
    units = ops.aggregate(x, weights, chain=chain)
    assert units.dtype == dtype
    assert relative_error(units, defined(x, weights, chain=chain)) <= tolerance


def test_selection_is_made_once():
    calls = []
    cache, weights = ops.WeightsCache(), random_matrices(8, 4)

    def select(given):
        calls.append(1)
        return given

    for expected, change in [
        (1, lambda: None),
        (1, lambda: None),
        (2, lambda: weights[0].mul_(2)),
        (3, lambda: weights.__setitem__(0, torch.randn(4, 8))),
        (4, cache.clear),
    ]:
        change()
        cache.get("kind", weights, select)
        assert len(calls) == expected
    cache.get("another kind", weights, select)
    assert len(calls) == 5


def test_evaluation_keeps_the_selection(monkeypatch):
    calls, select = [], reference.aggregate.select_top2
    monkeypatch.setattr(reference.aggregate, "select_top2", lambda w: calls.append(1) or select(w))
    head, x = esl_fast.ESLHead(16, 2, 3, "adaptive"), torch.randn(2, 16)
    for mode, expected in [("eval", 6), ("eval", 6), ("train", 12), ("train", 18)]:
        if mode == "train" or head.training:
            getattr(head, mode)()
        with torch.no_grad():
            head(x, x)
        assert len(calls) == expected


BAD_AGGREGATES = {
    "chain": (torch.ones(2, 8), random_taps(2), "both", ValueError, "'normalized', 'raw'"),
    "integers": (torch.ones(2, 8, dtype=torch.int32), random_taps(2), "raw", TypeError, "x has dtype torch.int32"),
    "list": ([1.0, 2.0], random_taps(2), "raw", TypeError, "x is a list"),
    "scalar": (torch.tensor(1.0), random_taps(2), "raw", ValueError, "scalar"),
    "too many levels": (torch.ones(2, 8), random_taps(4), "raw", ValueError, r"\(4, 2\)"),
    "no width": (torch.ones(2, 8), random_taps(2, 0), "raw", ValueError, r"\(2, 0\)"),
    "one tap vector": (torch.ones(2, 8), torch.ones(2), "raw", ValueError, r"\(2,\)"),
    "matrix": (torch.ones(2, 8), random_matrices(8, 4, 5, 3)[::2], "raw", ValueError, r"level 2 .* \(3, 5\)"),
    "integer weights": (torch.ones(2, 8), [torch.ones(4, 8).int()], "raw", TypeError, "weights has dtype"),
    "device": (torch.ones(2, 8), [torch.ones(4, 8, device="meta")], "raw", ValueError, r"weights\[0\] on meta"),
    "nan": (torch.tensor([[1.0, 1.0], [1.0, torch.nan]]), random_taps(1), "raw", ValueError, "1 of 2 rows: 1"),
}


@pytest.mark.parametrize(("x", "weights", "chain", "error", "message"), BAD_AGGREGATES.values(), ids=BAD_AGGREGATES)
def test_aggregate_errors(x, weights, chain, error, message):
    with pytest.raises(error, match=message):
        ops.aggregate(x, weights, chain=chain)


def test_a_message_names_ten_rows_at_most():
    with pytest.raises(ValueError, match=r"12 of 12 rows: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.$"):
        ops.aggregate(torch.full((12, 4), torch.nan), random_taps(1), chain="raw")


# Contribution


def test_degrees():
    w = torch.tensor([0.1, -0.4, 0.2, 0.0])
    gate, log_sharpness = torch.tensor(0.25), torch.tensor(3.0).log()
    expected = [((abs(v) - 0.1) * 3.0, v) for v in w.tolist()]  # threshold (0.4 - 0) / 4 + 0
    expected = torch.tensor([v * 2.718281828**e for e, v in expected])
    torch.testing.assert_close(ops.degrees(w, gate, log_sharpness, sigmoid_gate=False), expected)
    torch.testing.assert_close(ops.degrees(w, gate.logit(), log_sharpness, mean=True), expected / 4)
    torch.testing.assert_close(ops.degrees(w, gate, log_sharpness, sharp=False), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_degrees_of_half_precision(dtype):
    """The exponential would make much of a rounded exponent."""
    given = [x.to(dtype) for x in (torch.tensor([0.3, -0.7, 0.1, 0.5]), torch.tensor(-1.0), torch.tensor(4.0))]
    found, expected = ops.degrees(*given), ops.degrees(*(x.double() for x in given))
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("w", [[0.3, -0.7, 0.1, 0.5], [-0.2], [0.9, 0.4]])
def test_degrees_gradients_through_the_extremes(w):
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (w, 0.4, 2.0)]
    assert torch.autograd.gradcheck(ops.degrees, inputs)
    if len(w) > 2:  # the smallest and the largest move every other level's degree
        moved = torch.autograd.functional.jacobian(lambda v: ops.degrees(v, *inputs[1:]), inputs[0])
        assert (moved[:, torch.tensor(w).abs().argmin()] != 0).all()
        assert (moved[:, torch.tensor(w).abs().argmax()] != 0).all()
        assert moved[0, 3] == 0


@pytest.mark.parametrize("shapes", [((2, 2), (), ()), ((3,), (2,), ()), ((3,), (), (0,))])
def test_degrees_errors(shapes):
    with pytest.raises(ValueError, match="two scalars"):
        ops.degrees(*(torch.ones(shape) for shape in shapes))


@pytest.fixture
def levels():
    """Units of two sides, matrices and degrees of levels 7, 3, 1."""
    matrices = [torch.randn(d, d) for d in (7, 3, 1)]
    return torch.randn(4, 11), torch.randn(6, 11), matrices, torch.randn(3)


@pytest.mark.parametrize("grad", [False, True])
def test_folding_gives_the_similarity(levels, grad):
    images, texts, matrices, degrees = levels
    expected = reference.similarity.similarity_by_level(images, texts, matrices, degrees)
    if grad:
        images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scales = degrees / len(matrices)
    folded_texts = ops.fold(texts, matrices, scales, side="text")
    folded_images = ops.fold(images, matrices, scales, side="image")
    torch.testing.assert_close(ops.similarity(images, folded_texts), expected)
    torch.testing.assert_close(ops.similarity(folded_images, texts), expected)
    assert (folded_texts.shape, folded_images.shape) == (texts.shape, images.shape)
    assert folded_texts.requires_grad == grad


@pytest.mark.parametrize("shape", [(11,), (0, 11), (2, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["image", "text"])
def test_fold_any_shape_and_dtype(levels, shape, dtype, side):
    _, _, matrices, scales = levels
    units = torch.randn(shape).to(dtype)
    folded = ops.fold(units, matrices, scales, side=side)
    assert folded.dtype == dtype
    expected = reference.contribution.fold(units.double(), [m.double() for m in matrices], scales.double(), side=side)
    torch.testing.assert_close(folded, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


BAD_FOLDS = {
    "side": ({"side": "caption"}, ValueError, "'image', 'text'"),
    "units": ({"units": torch.ones(2, 10)}, ValueError, r"\(2, 10\).* 11 units"),
    "integers": ({"units": torch.ones(2, 11).long()}, TypeError, "units has dtype"),
    "scales": ({"scales": torch.ones(2)}, ValueError, "3 levels"),
    "rectangle": ({"matrices": [torch.ones(11, 3)], "scales": torch.ones(1)}, ValueError, r"matrices\[0\].*\(11, 3\)"),
    "device": ({"scales": torch.ones(3, device="meta")}, ValueError, "scales on meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_FOLDS.values(), ids=BAD_FOLDS)
def test_fold_errors(levels, change, error, message):
    arguments = {"units": levels[0], "matrices": levels[2], "scales": levels[3], "side": "text"} | change
    with pytest.raises(error, match=message):
        ops.fold(**arguments)


BAD_PAIRS = {
    "width": (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"folded_text_units has shape \(2, 4\)"),
    "vector": (torch.ones(3), torch.ones(2, 3), ValueError, r"image_units has shape \(3,\)"),
    "integers": (torch.ones(2, 3), torch.ones(2, 3).int(), TypeError, "folded_text_units has dtype"),
    "device": (torch.ones(2, 3), torch.ones(2, 3, device="meta"), ValueError, "folded_text_units on meta"),
}


@pytest.mark.parametrize(("images", "texts", "error", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_pair_errors(images, texts, error, message):
    with pytest.raises(error, match=message):
        ops.similarity(images, texts)
    with pytest.raises(error, match=message):
        ops.retrieval_ranks(images, texts, torch.zeros(2, dtype=torch.int64))


# Ranks. Units are small whole numbers, so that products are exact and ties are ties.

OWNERS = {
    "five each": lambda n: torch.arange(n).repeat_interleave(5),
    "one each": torch.arange,
    "any order": lambda n: torch.randint(n, (3 * n,)),
    "some without": lambda n: torch.randint(n, (2 * n,)) // 3 * 3,
    "all of one": lambda n: torch.full((4 * n,), n // 2),
}


@pytest.fixture(params=[(512, 4096), (4, 9), (1, 1), (3, 1000)], ids=str)
def blocks(request, monkeypatch):
    images, captions = request.param
    monkeypatch.setattr(blocked.ranks, "BLOCK_IMAGES", images)
    monkeypatch.setattr(blocked.ranks, "BLOCK_CAPTIONS", captions)


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1, 4])  # many ties, few ties
@pytest.mark.usefixtures("blocks")
def test_ranks(owners, dtype, spread):
    owners = owners(13)
    images = torch.randint(-spread, spread + 1, (13, 6)).to(dtype)
    texts = torch.randint(-spread, spread + 1, (len(owners), 6)).to(dtype)
    images[7] = images[2]
    texts[1] = texts[0]
    expected = reference.ranks.retrieval_ranks(images.double() @ texts.double().T, owners)
    ranks = esl_fast.retrieval_ranks(images, texts, owners)
    for actual, wanted in zip(ranks, expected, strict=True):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, wanted)
    uncaptioned = torch.bincount(owners, minlength=13) == 0
    assert (ranks[0][uncaptioned] == len(owners)).all()


@pytest.mark.parametrize("finer", ["image_units", "folded_text_units"])
def test_ranks_and_search_in_the_finer_dtype(finer):
    """Of scores 1 and 1 + 1e-10, which are one in float32, both are right."""
    close = torch.tensor([[1, 1 + 1e-10]], dtype=torch.float64)
    images, texts = (close, torch.eye(2)) if finer == "image_units" else (torch.ones(1, 1), close.mT)
    image_ranks, _ = esl_fast.retrieval_ranks(images, texts, owners=torch.tensor([0, 0]))
    assert image_ranks.tolist() == [0]
    values, indices = esl_fast.topk(images, texts, k=2)
    assert values.dtype == torch.float64
    assert indices.tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_compared_in_float32(dtype):
    """Scores rounded to half a precision would tie in crowds."""
    images, texts = torch.randn(40, 64).to(dtype), torch.randn(200, 64).to(dtype)
    owners = torch.arange(40).repeat_interleave(5)
    for op in (lambda a, b: esl_fast.retrieval_ranks(a, b, owners), lambda a, b: esl_fast.topk(a, b, 9)):
        assert all(map(torch.equal, op(images, texts), op(images.float(), texts.float())))


@pytest.mark.parametrize("elements", [1, 60, 1 << 24])
@pytest.mark.parametrize(("queries", "gallery", "k"), [(1, 1, 1), (7, 41, 5), (3, 20, 20), (7, 41, 100), (0, 5, 2)])
def test_topk_block_by_block(monkeypatch, elements, queries, gallery, k):
    """Of scores that often tie, within blocks and across them."""
    monkeypatch.setattr(blocked.topk, "BLOCK_ELEMENTS", elements)
    a, b = torch.randint(-2, 3, (queries, 3)).float(), torch.randint(-2, 3, (gallery, 3)).float()
    found, expected = esl_fast.topk(a, b, k), reference.topk.topk(a @ b.mT, min(k, gallery))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_topk_of_what_is_not_finite(monkeypatch, elements):
    monkeypatch.setattr(blocked.topk, "BLOCK_ELEMENTS", elements)
    scores = torch.tensor([torch.nan, -1, -torch.inf, torch.inf, -0.0, 0.0, -1])
    found, expected = esl_fast.topk(torch.ones(1, 1), scores[:, None], 7), reference.topk.topk(scores[None], 7)
    assert all(map(torch.equal, found, expected))


def test_ranks_compiled_for_any_size():
    compiled = torch.compile(esl_fast.retrieval_ranks, backend="eager", dynamic=True)
    for n in (5, 7):
        units = torch.randn(n, 8), torch.randn(3 * n, 8)
        owners = torch.arange(3 * n) % n
        found, expected = compiled(*units, owners), esl_fast.retrieval_ranks(*units, owners)
        assert all(map(torch.equal, found, expected))


def test_ranks_of_a_known_matrix():
    similarity = torch.tensor([[5.0, 1.0, 4.0, 9.0], [2.0, 3.0, 3.0, 0.0]])
    owners = torch.tensor([0, 0, 1, 1])
    for ranks in (esl_fast.retrieval_ranks(similarity, torch.eye(4), owners),
                  reference.ranks.retrieval_ranks(similarity, owners)):  # fmt: skip
        assert ranks[0].tolist() == [1, 1]  # the best of each: 5 behind 9; 3 tied with a foreign 3
        assert ranks[1].tolist() == [0, 1, 1, 1]


@pytest.mark.usefixtures("blocks")
def test_equal_scores_count_against_the_model():
    ranks = esl_fast.retrieval_ranks(torch.ones(11, 3), torch.ones(55, 3), torch.arange(11).repeat_interleave(5))
    assert (ranks[0] == 54).all()
    assert (ranks[1] == 10).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("blocks")
def test_scores_that_are_not_finite_do_not_pass_for_good(bad):
    images, texts, owners = torch.randn(11, 6), torch.randn(33, 6), torch.arange(33) % 11
    images[4, 2] = bad
    image_ranks, text_ranks = blocked.ranks.retrieval_ranks(images, texts, owners)
    hit = owners == 4
    assert image_ranks[4] == 32
    assert (text_ranks[hit] == 10).all()
    expected = reference.ranks.retrieval_ranks((images @ texts.T).nan_to_num(torch.inf, torch.inf, -torch.inf), owners)
    assert torch.equal(image_ranks[torch.arange(11) != 4], expected[0][torch.arange(11) != 4])
    assert torch.equal(text_ranks[~hit], expected[1][~hit])


@pytest.mark.parametrize("images", [0, 3])
def test_ranks_of_nothing(images):
    ranks = esl_fast.retrieval_ranks(torch.ones(images, 4), torch.ones(0, 4), torch.zeros(0, dtype=torch.int64))
    assert [r.tolist() for r in ranks] == [[0] * images, []]


def test_ranks_carry_no_gradient():
    units = torch.randn(4, 3, requires_grad=True)
    assert not any(r.requires_grad for r in esl_fast.retrieval_ranks(units, units, torch.arange(4)))


BAD_OWNERS = {
    "list": ([0, 1], TypeError, "owners is a list"),
    "too few": (torch.zeros(1).long(), ValueError, r"shape \(1,\).*\(2,\) integers"),
    "floats": (torch.zeros(2), TypeError, "float32"),
    "bools": (torch.zeros(2).bool(), TypeError, "bool"),
    "too large": (torch.tensor([0, 3]), ValueError, r"0\.\.3.*0\.\.2"),
    "negative": (torch.tensor([-1, 0]), ValueError, r"-1\.\.0"),
    "device": (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "owners on meta"),
}


@pytest.mark.parametrize(("owners", "error", "message"), BAD_OWNERS.values(), ids=BAD_OWNERS)
def test_owner_errors(owners, error, message):
    with pytest.raises(error, match=message):
        esl_fast.retrieval_ranks(torch.ones(3, 4), torch.ones(2, 4), owners)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["image_units", "folded_text_units"])
def test_ranks_refuse_non_finite_scores(side, value):
    units = {"image_units": torch.ones(3, 4), "folded_text_units": torch.ones(3, 4)}
    units[side][2, 1] = value
    with pytest.raises(ValueError, match=f"{side} .* 1 of 3 rows: 2"):
        esl_fast.retrieval_ranks(**units, owners=torch.arange(3))


# What is made of weights


def test_what_is_made_of_weights_is_made_again_when_they_change():
    cache, weights, made = ops.WeightsCache(), [torch.ones(3), torch.ones(2)], []

    def get(kind="sum", weights=weights):
        return cache.get(kind, weights, lambda given: made.append(kind) or sum(w.sum().item() for w in given))

    assert (get(), get(), len(made)) == (5, 5, 1)
    assert (get("other"), get(), len(made)) == (5, 5, 2)
    weights[0].add_(1)
    assert (get(), get(), len(made)) == (8, 8, 3)
    weights[0].data.add_(1)  # which raises no version
    assert (get(), get(), len(made)) == (11, 11, 4)
    assert get(weights=[torch.ones(3), weights[1]]) == 5
    assert get() == 11
    kept = len(made)
    cache.drop({id(weights[1])})
    assert (get(), len(made)) == (11, kept + 1)
    assert (copy.deepcopy(cache).get("sum", weights, lambda _: 0), get()) == (0, 11)
    with torch.inference_mode():
        unwatched = [torch.ones(3)]
        assert [cache.get("new", unwatched, lambda _: 1, lambda _: 2) for _ in range(2)] == [2, 2]
    cache.clear()
    assert (get(), len(made)) == (11, kept + 2)


# Choice of implementation


@pytest.fixture
def any_backend():
    yield
    esl_fast.use_backend("auto")


@pytest.mark.usefixtures("any_backend")
def test_a_choice_of_backend_may_be_used_again():
    esl_fast.use_backend("auto")
    choice = esl_fast.use_backend("torch")
    for _ in range(2):
        with choice:
            assert ops.backend._active == "torch"
        assert ops.backend._active == "auto"


@pytest.mark.usefixtures("any_backend")
def test_a_choice_of_backend_may_be_nested_in_itself():
    choice = esl_fast.use_backend("torch")
    with choice:
        with choice:
            pass
        assert ops.backend._active == "torch"
    assert ops.backend._active == "auto"


def run_anything():
    return ops.aggregate(torch.ones(1, 4), random_taps(1), chain="raw")


def refused():
    return pytest.raises(RuntimeError, match=r"use_backend\(\"auto\"\)")  # says the way out


@pytest.mark.usefixtures("any_backend")
@pytest.mark.skipif(INTERPRETING, reason="interpreted kernels run on a CPU")
def test_use_backend():
    esl_fast.use_backend("triton")
    with refused():
        run_anything()
    with esl_fast.use_backend("torch"):
        run_anything()
        with esl_fast.use_backend("triton"), refused():
            run_anything()
        run_anything()
    with pytest.raises(ZeroDivisionError), esl_fast.use_backend("torch"):
        _ = 1 / 0
    with refused():
        run_anything()
    esl_fast.use_backend("auto")
    run_anything()


def test_unknown_backend():
    with pytest.raises(ValueError, match="'auto', 'triton', 'torch'"):
        esl_fast.use_backend("cuda")
    run_anything()


def test_autocast_changes_nothing():
    images, texts, owners = torch.randn(40, 30), torch.randn(90, 30), torch.randint(40, (90,))
    leaves = [t.clone().requires_grad_() for t in (images, texts[:40], torch.tensor(3.0))]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ops.contrastive_loss(*leaves)
            gradients = torch.autograd.grad(loss, leaves)
            found.append((*ops.retrieval_ranks(images, texts, owners), *ops.topk(images, texts, 7), loss, *gradients))
    assert all(map(torch.equal, *found))


def test_autocast_is_off_whatever_device_comes_first():
    product = without_autocast(lambda elsewhere, x: x @ x)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(torch.ones(2, device="meta"), torch.ones(2, 2)).dtype == torch.float32


LOSSES = {
    "contrastive": lambda images, texts: ops.contrastive_loss(images, texts, 3.0),
    "hinge": lambda images, texts: ops.hinge_loss(images @ texts.mT),
    "hardest": lambda images, texts: ops.hinge_loss(images @ texts.mT, hardest=True),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("way", ["functional", "compiled"])
def test_losses_in_transforms(loss, way):
    units = torch.randn(2, 11, 6)

    def gradients(of):
        leaves = [side.clone().requires_grad_() for side in units]
        return torch.autograd.grad(of(*leaves), leaves)

    if way == "functional":
        found = torch.func.grad(loss, argnums=(0, 1))(*units)
    else:
        found = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, gradients(loss))


IDS = torch.arange(6) % 4
OF_ONE_TENSOR_TWICE = {
    "ids": lambda x: esl_fast.contrastive_loss(x, 2 * x, 3.0, image_ids=IDS, text_ids=IDS),
    "units": lambda x: esl_fast.contrastive_loss(x, x, 3.0),
    "hinge": lambda x: esl_fast.hinge_loss(x, IDS, IDS),
}


@pytest.mark.parametrize("loss", OF_ONE_TENSOR_TWICE.values(), ids=OF_ONE_TENSOR_TWICE)
def test_losses_of_one_tensor_twice(loss):
    found = []
    for way in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        found.append((way(x), *torch.autograd.grad(way(x), x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_forward_and_in_batches(loss):
    images, texts, direction = torch.randn(3, 3, 11, 6, dtype=torch.float64)
    expected = torch.stack([loss(a, b) for a, b in zip(images, texts, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(images, texts), expected)
    _, slope = torch.func.jvp(loss, (images[0], texts[0]), (direction[0], direction[1]))
    up, down = (loss(images[0] + eps * direction[0], texts[0] + eps * direction[1]) for eps in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [LOSSES["contrastive"], LOSSES["hinge"]], ids=["contrastive", "hinge"])
def test_losses_are_no_constants_to_a_second_gradient(loss):
    images, texts = torch.randn(2, 11, 6)
    weights = torch.eye(6, requires_grad=True)
    gradient, *_ = torch.autograd.grad(loss(images @ weights, texts), [weights], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.functional.hessian(lambda a: loss(a, texts), images)


def test_owners_without_images():
    with pytest.raises(ValueError, match="there are no images"):
        esl_fast.retrieval_ranks(torch.ones(0, 4), torch.ones(2, 4), torch.zeros(2).long())


def test_topk_converts_few_of_a_gallery_at_a_time(monkeypatch):
    monkeypatch.setattr(blocked.topk, "BLOCK_ELEMENTS", 40)
    sizes, update = [], blocked.topk.Best.update

    def counted(best, queries, first, scores):
        sizes.append(scores.shape[1])
        update(best, queries, first, scores)

    monkeypatch.setattr(blocked.topk.Best, "update", counted)
    esl_fast.topk(torch.ones(1, 8), torch.ones(17, 8).half(), 2)
    assert sizes == [5, 5, 5, 2]


def test_topk_compiled():
    queries, gallery = torch.randint(-2, 3, (7, 3)).float(), torch.randint(-2, 3, (60, 3)).float()  # many ties
    found = torch.compile(ops.topk, fullgraph=True, backend="aot_eager")(queries, gallery, 9)
    assert all(map(torch.equal, found, ops.topk(queries, gallery, 9)))


IGNORING = {"same_owner": "ignore"}
CONTRASTIVE = {
    "diagonal": (23, 23, None, "positive"),
    "one pair": (1, 1, None, "positive"),
    "negative": (23, 23, 5, "negative"),
    "positive": (23, 37, 30, "positive"),  # some have none
    "several positives": (23, 37, 5, "positive"),  # of rows and of columns, not equally many
    "ignore": (23, 23, 5, "ignore"),
    "ignore everything": (40, 40, 1, "ignore"),  # a block of rows may hold nothing that counts for a text
}


@pytest.mark.parametrize("case", CONTRASTIVE.values(), ids=CONTRASTIVE)
@pytest.mark.parametrize("elements", [1, 1 << 21], ids=["16 rows", "one block"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_contrastive_loss(monkeypatch, case, elements, dtype, tolerance):
    monkeypatch.setattr(blocked.contrastive, "BLOCK_ELEMENTS", elements)
    n, m, owners, same_owner = case
    ids = [torch.arange(k) * 7 % owners for k in (n, m)] if owners else (None, None)
    leaves = [torch.randn(n, 9), torch.randn(m, 9), torch.tensor(3.0)]

    def run(loss, dtype):
        given = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        value = loss(*given)
        return value, *torch.autograd.grad(value * 3, given)

    found = run(lambda *x: ops.contrastive_loss(*x, image_ids=ids[0], text_ids=ids[1], same_owner=same_owner), dtype)
    definition = reference.contrastive.contrastive_loss
    expected = run(lambda a, b, scale: definition(a @ b.mT, scale, *ids, same_owner), torch.float64)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"image_units": [[1.0]]}, TypeError, "image_units is a list"),
        ({"image_units": torch.tensor(1.0)}, ValueError, "image_units has shape"),
        ({"image_ids": [0, 1, 2], "text_ids": torch.arange(3)}, TypeError, "image_ids is a list"),
        ({"image_ids": torch.arange(3)}, ValueError, "go together"),
        ({"image_ids": torch.arange(2), "text_ids": torch.arange(3)}, ValueError, "image_ids has shape"),
        ({"image_ids": torch.ones(3).bool(), "text_ids": torch.arange(3)}, TypeError, "dtype torch.bool"),
        ({"image_ids": torch.ones(3) * 1j, "text_ids": torch.arange(3)}, TypeError, "dtype torch.complex64"),
        ({"image_units": torch.ones(2, 4)}, ValueError, "2 images and 3 texts have no diagonal"),
        (
            {"image_units": torch.ones(2, 4), "image_ids": torch.arange(2), "text_ids": torch.arange(3)} | IGNORING,
            ValueError,
            "2 images and 3 texts have no diagonal",
        ),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale has shape"),
        ({"logit_scale": torch.ones(()) * 1j}, ValueError, "dtype torch.complex64; expected one real value"),
        ({"logit_scale": "x"}, TypeError, "logit_scale is 'x'; expected a number"),
    ],
)
def test_contrastive_loss_refuses(given, error, message):
    units = torch.randn(3, 4)
    with pytest.raises(error, match=message):
        ops.contrastive_loss(**{"image_units": units, "folded_text_units": units, "logit_scale": 1.0} | given)
