"""Ranks, best matches and re-ranking by regions and words, against the whole matrix."""

import pytest
import torch

from esl_fast import blocked, ops, reference
from esl_fast.ops import region_word, region_word_retrieval

OWNERS = {
    "five each": lambda n: torch.arange(n).repeat_interleave(5),
    "one each": torch.arange,
    "any order": lambda n: torch.randint(n, (3 * n,)),
    "some without": lambda n: torch.randint(n, (2 * n,)) // 3 * 3,
    "all of one": lambda n: torch.full((4 * n,), n // 2),
}
queries = pytest.mark.parametrize("query", ["image", "text"])


def poison(units, lengths):
    """Padding that shows wherever it is read."""
    if lengths is not None:
        units[torch.arange(units.shape[1]) >= lengths[:, None]] = torch.nan
    return units


def random_case(n, m, *, padded_regions=True, dtype=torch.float64, width=10):
    region_lengths = torch.randint(1, 5, (n,)) if padded_regions else None
    word_lengths = torch.randint(1, 8, (m,))
    region_units = poison(torch.randn(n, 4, width, dtype=dtype), region_lengths)
    word_units = poison(torch.randn(m, 7, width, dtype=dtype), word_lengths)
    return region_units, word_units, torch.tensor(9.0, dtype=dtype), word_lengths, region_lengths


def exact_case(n, m, *, spread=2, dtype=torch.float32):
    """Small whole numbers and attentions that are uniform over 1, 2 or 4: no score is rounded, so ties are ties."""
    region_lengths, word_lengths = 2 ** torch.randint(3, (n,)), 2 ** torch.randint(3, (m,))
    region_units = torch.randint(-spread, spread + 1, (n, 4, 5)).to(dtype)
    word_units = torch.randint(-spread, spread + 1, (m, 4, 5)).to(dtype)
    if n > 7:
        region_units[7], region_lengths[7] = region_units[2], region_lengths[2]
    if m > 1:
        word_units[1], word_lengths[1] = word_units[0], word_lengths[0]
    return (
        poison(region_units, region_lengths), poison(word_units, word_lengths), 0.0, word_lengths, region_lengths,
    )  # fmt: skip


def matrix(region_units, word_units, smooth, word_lengths, region_lengths):
    """The definition, in float64; rounded it would order what is equal in exact arithmetic."""
    return reference.region_word.region_word_similarity(
        region_units.double(), word_units.double(), float(smooth), word_lengths, region_lengths
    )


@pytest.fixture(params=[(512, 4096, 1 << 27, 1 << 25), (4, 9, 1, 1), (3, 1000, 300, 500)], ids=str)
def blocks(request, monkeypatch):
    images, captions, taken, gathered = request.param
    for module in (blocked.ranks, region_word_retrieval):
        monkeypatch.setattr(module, "BLOCK_IMAGES", images)
        monkeypatch.setattr(module, "BLOCK_CAPTIONS", captions)
    monkeypatch.setattr(region_word, "GATHERED_BYTES", taken)
    monkeypatch.setitem(blocked.region_word_pairs.GATHERED_BYTES, "cpu", gathered)


# Ranks


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("spread", [1, 3])  # many ties, few ties
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("blocks")
def test_ranks_with_ties(owners, spread, dtype):
    owners = owners(13)
    case = exact_case(13, len(owners), spread=spread, dtype=dtype)
    expected = reference.ranks.retrieval_ranks(matrix(*case), owners)
    ranks = ops.region_word_ranks(*case[:4], owners, case[4])
    for actual, wanted in zip(ranks, expected, strict=True):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, wanted)
    assert (ranks[0][torch.bincount(owners, minlength=13) == 0] == len(owners)).all()


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("padded_regions", [False, True])
@pytest.mark.usefixtures("blocks")
def test_ranks(owners, padded_regions):
    owners = owners(11)
    case = random_case(11, len(owners), padded_regions=padded_regions)
    expected = reference.ranks.retrieval_ranks(matrix(*case), owners)
    ranks = ops.region_word_ranks(*case[:4], owners, case[4])
    assert all(torch.equal(*pair) for pair in zip(ranks, expected, strict=True))


@pytest.mark.usefixtures("blocks")
def test_equal_scores_count_against_the_model():
    lengths, owners = torch.full((55,), 3), torch.arange(11).repeat_interleave(5)
    ranks = ops.region_word_ranks(torch.zeros(11, 2, 4), torch.zeros(55, 3, 4), 14.0, lengths, owners)
    assert (ranks[0] == 54).all()
    assert (ranks[1] == 10).all()


@pytest.mark.usefixtures("blocks")
def test_a_positive_never_loses_to_its_own_rounding(monkeypatch):
    """Scores that differ from call to call in their last bits, as those of another block shape may."""
    similarity = region_word.region_word_similarity

    def noisy(*arguments, **options):
        scores = similarity(*arguments, **options)
        return scores * (1 + 1e-6 * torch.rand_like(scores))

    monkeypatch.setattr(region_word, "region_word_similarity", noisy)
    region_units = torch.eye(11)[:, None].repeat(1, 2, 1)
    owners = torch.randperm(11)
    ranks = ops.region_word_ranks(region_units, region_units[owners], 14.0, torch.full((11,), 2), owners)
    assert (ranks[0] == 0).all()
    assert (ranks[1] == 0).all()


@pytest.mark.parametrize("images", [0, 3])
def test_ranks_of_nothing(images):
    case = random_case(images, 0)
    ranks = ops.region_word_ranks(*case[:4], torch.zeros(0, dtype=torch.int64), case[4])
    assert [r.tolist() for r in ranks] == [[0] * images, []]
    sides = {"image_units": torch.ones(images, 2), "text_units": torch.ones(0, 2)}
    ranks = ops.rerank_ranks(*case[:4], torch.zeros(0, dtype=torch.int64), case[4], k=2, **sides)
    assert [r.tolist() for r in ranks] == [[0] * images, []]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("second_stage", [False, True])
def test_non_finite_units_are_named(side, value, second_stage):
    region_units, word_units, *rest, word_lengths, region_lengths = random_case(70, 70, padded_regions=True)
    (region_units, word_units)[side][66, 0, 3] = value
    name = ("region_units", "word_units")[side]
    arguments = (region_units, word_units, *rest, word_lengths, torch.arange(70), region_lengths)
    options = {"image_units": torch.ones(70, 2), "text_units": torch.ones(70, 2), "k": 3} if second_stage else {}
    with pytest.raises(ValueError, match=f"{name} .* 1 of 70 rows: 66"):
        (ops.rerank_ranks if second_stage else ops.region_word_ranks)(*arguments, **options)


def test_large_units_are_finite():
    """Their sum overflows, they do not."""
    case = (torch.full((2, 1, 2), 3e38), torch.full((2, 1, 2), 1e-38), 1.0, torch.tensor([1, 1]))
    ranks = ops.region_word_ranks(*case, torch.arange(2))
    assert ranks[0].tolist() == ranks[1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("owners", "message"), [([0, 1, 2, 5], r"0\.\.5.*0\.\.2"), ([0, 0, 0], r"\(4,\) integers")]
)
def test_ranks_check_owners(owners, message):
    case, owners = random_case(3, 4), torch.tensor(owners)
    sides = {"image_units": torch.ones(3, 2), "text_units": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=message):
        ops.region_word_ranks(*case[:4], owners, case[4])
    with pytest.raises(ValueError, match=message):
        ops.rerank_ranks(*case[:4], owners, case[4], k=3, **sides)


# The best k


def best(scores, k, query):
    return reference.topk.topk(scores if query == "image" else scores.mT, k)


@queries
@pytest.mark.parametrize("k", [1, 3, 11, 100])
@pytest.mark.usefixtures("blocks")
def test_topk(query, k):
    case = random_case(11, 17)
    scores, indices = ops.region_word_topk(*case, k=k, query=query)
    expected = best(matrix(*case), k, query)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])


@queries
@pytest.mark.parametrize("k", [1, 5, 13])
@pytest.mark.usefixtures("blocks")
def test_topk_with_ties(query, k):
    case = exact_case(13, 19, spread=1)
    scores, indices = ops.region_word_topk(*case, k=k, query=query)
    expected = best(matrix(*case), k, query)
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores.double(), expected[0])


@queries
@pytest.mark.usefixtures("blocks")
def test_topk_counts_nan_as_the_lowest(query):
    region_units, word_units, *rest = exact_case(13, 13)
    (word_units if query == "image" else region_units)[2] = torch.nan
    scores, indices = ops.region_word_topk(region_units, word_units, *rest, k=13, query=query)
    assert (indices[:, -1] == 2).all()
    assert (scores[:, -1] == -torch.inf).all()
    assert scores[:, :-1].isfinite().all()


@queries
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_best_of_nothing(query, sizes):
    case = random_case(*sizes)
    asking, asked = sizes if query == "image" else sizes[::-1]
    sides = {"image_units": torch.ones(sizes[0], 2), "text_units": torch.ones(sizes[1], 2)}
    for scores, indices in (
        ops.region_word_topk(*case, k=2, query=query),
        ops.rerank(*case, **sides, k=2, query=query),
    ):
        assert scores.shape == indices.shape == (asking, min(2, asked))
        assert (scores.dtype, indices.dtype) == (torch.float64, torch.int64)


# Two stages


def reranked(scores, candidates):
    """Candidates and their scores in the order of the latter."""
    chosen = scores.gather(1, candidates)
    chosen, order = chosen.sort(dim=1, descending=True, stable=True)
    return chosen, candidates.gather(1, order)


def global_sides(n, m):
    return {"image_units": torch.randint(-2, 3, (n, 4)).double(), "text_units": torch.randint(-2, 3, (m, 4)).double()}


@queries
@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("padded_regions", [False, True])
@pytest.mark.usefixtures("blocks")
def test_rerank(query, k, padded_regions):
    case, sides = random_case(11, 17, padded_regions=padded_regions), global_sides(11, 17)
    scores, indices = ops.rerank(*case, **sides, k=k, query=query)
    shortlist = best(sides["image_units"] @ sides["text_units"].T, k, query)[1]
    whole = matrix(*case) if query == "image" else matrix(*case).mT
    expected = reranked(whole, shortlist)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])


@queries
@pytest.mark.usefixtures("blocks")
def test_equal_scores_keep_the_order_of_the_shortlist(query):
    case = exact_case(13, 13, spread=1)
    candidates = torch.stack([torch.randperm(13)[:6] for _ in range(13)])
    whole = matrix(*case) if query == "image" else matrix(*case).mT
    expected = reranked(whole, candidates)
    scores, indices = ops.region_word_rerank(*case[:4], candidates, case[4], query=query)
    assert torch.equal(indices, expected[1])
    assert torch.equal(scores.double(), expected[0])


@queries
def test_rerank_everything_is_the_search(query):
    case, sides = random_case(6, 9), global_sides(6, 9)
    for actual, wanted in zip(
        ops.rerank(*case, **sides, k=9, query=query), ops.region_word_topk(*case, k=9, query=query), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rerank_dtypes(dtype):
    case = random_case(5, 8, dtype=dtype)
    candidates = torch.randint(8, (5, 3))
    scores, indices = ops.region_word_rerank(*case[:4], candidates, case[4])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), matrix(*case).gather(1, indices), rtol=1e-4, atol=1e-5)


def test_rerank_any_layout():
    region_units, word_units, *rest = random_case(5, 8)
    major = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in (region_units, word_units)]
    candidates = torch.randint(8, (5, 3))
    for actual, wanted in zip(
        ops.region_word_rerank(*major, *rest[:2], candidates, rest[2]),
        ops.region_word_rerank(region_units, word_units, *rest[:2], candidates, rest[2]),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@queries
def test_rerank_puts_nan_last(query):
    region_units, word_units, *rest = exact_case(9, 9)
    (word_units if query == "image" else region_units)[2] = torch.nan
    candidates = torch.tensor([[2, 0, 3]]).expand(9, 3)
    scores, indices = ops.region_word_rerank(region_units, word_units, *rest[:2], candidates, rest[2], query=query)
    assert (indices[:, -1] == 2).all()
    assert (scores[:, -1] == -torch.inf).all()


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.usefixtures("blocks")
def test_rerank_ranks(owners, k):
    owners = owners(13)
    m = len(owners)
    case, sides = exact_case(13, m), global_sides(13, m)
    ranks = ops.rerank_ranks(*case[:4], owners, case[4], **sides, k=k)
    coarse, fine = sides["image_units"] @ sides["text_units"].T, matrix(*case)
    for i in range(13):
        assert ranks[0][i] == final_rank(coarse[i], fine[i], (owners == i).nonzero().flatten().tolist(), k, m)
    for j in range(m):
        assert ranks[1][j] == final_rank(coarse[:, j], fine[:, j], [int(owners[j])], k, 13)


def final_rank(coarse, fine, right, k, none):
    """Rank of the best right item in one query's list, item by item."""
    if not right:
        return none
    order = sorted(range(len(coarse)), key=lambda item: (-float(coarse[item]), item))
    shortlist = order[:k]
    inside = [item for item in right if item in shortlist]
    if inside:
        bar = max(float(fine[item]) for item in inside)
        return sum(float(fine[item]) >= bar for item in shortlist) - 1
    bar = max(float(coarse[item]) for item in right)
    return max(sum(float(score) >= bar for score in coarse) - 1, k)


def test_rerank_ranks_of_everything_are_those_of_the_search():
    case, owners = random_case(7, 14), torch.arange(7).repeat_interleave(2)
    ranks = ops.rerank_ranks(*case[:4], owners, case[4], **global_sides(7, 14), k=14)
    expected = ops.region_word_ranks(*case[:4], owners, case[4])
    assert all(torch.equal(*pair) for pair in zip(ranks, expected, strict=True))


BAD_CANDIDATES = {
    "range": (torch.full((3, 2), 4), ValueError, r"4\.\.4.*0\.\.3"),
    "negative": (torch.full((3, 2), -1), ValueError, r"-1\.\.-1"),
    "rows": (torch.zeros(4, 2).long(), ValueError, r"\(4, 2\).*\(3, k\)"),
    "vector": (torch.zeros(3).long(), ValueError, r"\(3,\).*\(3, k\)"),
    "floats": (torch.zeros(3, 2), TypeError, "integer"),
    "list": ([[0]], TypeError, "integer"),
}


@pytest.mark.parametrize(("candidates", "error", "message"), BAD_CANDIDATES.values(), ids=BAD_CANDIDATES)
def test_candidate_errors(candidates, error, message):
    case = random_case(3, 4)
    with pytest.raises(error, match=message):
        ops.region_word_rerank(*case[:4], candidates, case[4])


BAD_SEARCHES = {
    "query": ({"query": "caption"}, "'image', 'text'"),
    "k": ({"k": 0}, "k is 0"),
    "images": ({"image_units": torch.ones(4, 2)}, "image_units has 4 rows; expected 3"),
    "texts": ({"text_units": torch.ones(3, 2)}, "text_units has 3 rows; expected 4"),
    "widths": ({"text_units": torch.ones(4, 3)}, r"text_units has shape \(4, 3\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_SEARCHES.values(), ids=BAD_SEARCHES)
def test_search_errors(change, message):
    case, options = random_case(3, 4), {"query": "image", "k": 2} | change
    sides = {"image_units": torch.ones(3, 2), "text_units": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=message):
        ops.rerank(*case, **(sides | options))
    if not {*change} & {*sides}:
        with pytest.raises(ValueError, match=message):
            ops.region_word_topk(*case, **options)


def test_pairs_errors_are_those_of_the_similarity():
    region_units, word_units, smooth, lengths, _ = random_case(3, 4, padded_regions=False)
    for run in (
        lambda *case: ops.region_word_topk(*case, k=2),
        lambda *case: ops.region_word_ranks(*case, torch.zeros(4).long()),
        lambda *case: ops.region_word_rerank(*case, torch.zeros(3, 2).long()),
    ):
        with pytest.raises(ValueError, match="caption 0 has no words"):
            run(region_units, word_units, smooth, 0 * lengths)
        with pytest.raises(TypeError, match="expected one dtype"):
            run(region_units, word_units.float(), smooth, lengths)


# Packing


@pytest.mark.parametrize("padded_regions", [False, True])
def test_packing_of_a_gallery(padded_regions):
    case = random_case(3, 8, padded_regions=padded_regions, dtype=torch.float32)
    packing = ops.pack_captions(case[1], case[3])
    scores = ops.region_word_similarity(*case, packing=packing)
    assert torch.equal(scores, ops.region_word_similarity(*case))


class Counted(torch.Tensor):
    """Counts how often parts of the whole are taken."""

    taken, size = 0, 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.taken += func is torch.Tensor.__getitem__ and len(args[0]) == cls.size
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(("query", "blocks"), [("image", 3), ("text", 4)])
def test_searched_side_is_read_once(query, blocks, monkeypatch):
    monkeypatch.setattr(region_word_retrieval, "BLOCK_IMAGES", 2)
    monkeypatch.setattr(region_word_retrieval, "BLOCK_CAPTIONS", 3)
    case = list(random_case(8, 9))
    expected = ops.region_word_topk(*case, k=2, query=query)
    side = 1 if query == "image" else 0
    case[side] = case[side].as_subclass(Counted)
    monkeypatch.setattr(Counted, "taken", 0)
    monkeypatch.setattr(Counted, "size", len(case[side]))
    found = ops.region_word_topk(*case, k=2, query=query)
    assert Counted.taken == blocks
    assert all(map(torch.equal, found, expected))


def test_captions_are_packed_once(monkeypatch):
    calls, pack = [], region_word.pack_captions
    monkeypatch.setattr(region_word, "pack_captions", lambda *a: calls.append(1) or pack(*a))
    monkeypatch.setattr(region_word_retrieval, "BLOCK_IMAGES", 2)
    monkeypatch.setattr(region_word_retrieval, "BLOCK_CAPTIONS", 3)
    ops.region_word_topk(*random_case(8, 9), k=2)
    assert len(calls) == 3
