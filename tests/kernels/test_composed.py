"""Aggregation by composed maps, against the float64 reference, and what inference keeps of weights."""

from itertools import pairwise

import pytest
import torch

import esl_fast
from esl_fast.kernels import composed
from esl_fast.kernels._common import INTERPRETING
from esl_fast.kernels.plan import target_of
from esl_fast.reference import aggregate as reference
from esl_fast.reference.aggregate import level_dims

# The interpreter rounds to bfloat16 by cutting off.
ROUNDING = 6e-3 if INTERPRETING else 4e-3


@pytest.fixture(autouse=True)
def everywhere(monkeypatch, device):
    if target_of(device) not in composed.TARGETS:
        pytest.skip(f"composed maps are not for {target_of(device)}")
    monkeypatch.setattr(composed, "FROM", 0)


def make(n, dims, device):
    generator = torch.Generator().manual_seed(0)  # the same numbers everywhere: few draws are beyond ROUNDING
    weights = [torch.randn(rows, columns, generator=generator).to(device) for columns, rows in pairwise(dims)]
    weights[0][0] = 0.25  # all equal: all are selected
    return torch.randn(n, dims[0], generator=generator).to(device).bfloat16(), weights


def defined(x, weights, **options):
    levels = [reference.select_top2(w.double()) for w in weights]
    return reference.aggregate(x.double(), levels, **options)


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("n", "dims"),
    [
        (130, level_dims(512, 2, 8)),
        (1, level_dims(512, 2, 2)),
        (257, level_dims(256, 2, 3)),
        (3, level_dims(256, 2, 8)),
    ],
    ids=str,
)
def test_units(n, dims, device):
    x, weights = make(n, dims, device)
    assert composed.serves(x, weights)
    maps = composed.compose(weights)
    for chain, normalize in (("normalized", True), ("raw", True), ("raw", False)):
        units = composed.aggregate_composed(x, maps, dims, chain, normalize)
        wanted = defined(x, weights, chain=chain, normalize=normalize).split(dims, 1)
        for found, level in zip(units.split(dims, 1), wanted, strict=True):
            assert error(found, level) <= ROUNDING
        rows = units.as_strided((n, units.stride(0)), units.stride())
        assert not rows[:, sum(dims) :].any()


def test_a_lone_level_is_gathered(device):
    assert not composed.serves(*make(3, level_dims(512, 2, 1), device))


def test_a_level_of_zeros_stays_one(device):
    dims = level_dims(256, 2, 8)
    x, weights = make(5, dims, device)
    weights[2].zero_()
    units = composed.aggregate_composed(1e-10 * x, composed.compose(weights), dims, "normalized", True)
    assert units.isfinite().all()
    assert not units[:, sum(dims[:3]) :].any()


@pytest.mark.parametrize(("chain", "levels"), [("normalized", 7), ("raw", 7), ("raw", 6)])
def test_short_vectors_keep_their_direction(chain, levels, device):
    dims = level_dims(256, 2, levels)
    x, weights = make(32, dims, "cpu")
    to_last = torch.linalg.multi_dot([reference.select_top2(w.double()) for w in reversed(weights)])
    # What the last level would be is taken away, as far as bfloat16 can.
    for _ in range(4):
        gone = torch.linalg.lstsq(to_last, to_last @ x.double().mT).solution.mT
        x = (x.double() - 0.999 * gone).to(x.dtype)
    x, weights = x.to(device), [w.to(device) for w in weights]
    wanted = defined(x, weights, chain=chain)[:, -dims[-1] :]
    units = composed.aggregate_composed(x, composed.compose(weights), dims, chain, True)[:, -dims[-1] :]
    assert error(units, wanted) <= 2 * ROUNDING


def test_no_worse_than_naive(device):
    dims = level_dims(256, 2, 7)
    x, weights = make(16, dims, device)
    wanted = defined(x, weights, chain="raw")
    naive = reference.aggregate(x, [reference.select_top2(w).bfloat16() for w in weights], chain="raw")
    units = composed.aggregate_composed(x, composed.compose(weights), dims, "raw", True)
    assert error(units, wanted) < error(naive, wanted)


def test_an_embedding_of_zeros_has_no_direction(device):
    dims = level_dims(256, 2, 2)
    x, weights = make(5, dims, device)
    x[3] = 0
    units = composed.aggregate_composed(x, composed.compose(weights), dims, "raw", True)
    assert units.isnan().all(1).tolist() == units.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.skipif(INTERPRETING, reason="interpreted programs run one after another")
def test_many_tiles_a_program(device):
    dims = level_dims(512, 2, 8)
    x, weights = make(40_000, dims, device)
    maps = composed.compose(weights)
    units = composed.aggregate_composed(x, maps, dims, "raw", True)
    assert error(units, defined(x, weights, chain="raw")) <= ROUNDING
    assert all(torch.equal(composed.aggregate_composed(x, maps, dims, "raw", True), units) for _ in range(5))


@pytest.mark.parametrize(
    ("dims", "dtype", "columns"),
    [
        (level_dims(1024, 2, 8), torch.bfloat16, 1024),  # level 1 is wider than a tile
        (level_dims(512, 3, 2), torch.bfloat16, 512),
        (level_dims(512, 2, 8), torch.float16, 512),
        (level_dims(512, 2, 8), torch.bfloat16, 513),  # rows out of line
    ],
    ids=str,
)
def test_what_does_not_fit(dims, dtype, columns, device):
    weights = [torch.randn(after, before, device=device) for before, after in pairwise(dims)]
    assert not composed.serves(torch.randn(9, columns, device=device).to(dtype)[:, : dims[0]], weights)


@pytest.fixture
def head(device):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(256, num_levels=3, aggregator="adaptive").to(device).eval()
    with torch.no_grad():
        for matrix in head.contribution.matrices:
            matrix.add_(torch.randn_like(matrix) / 10)
    return head


def test_inference_sees_new_weights(head, device, monkeypatch):
    made = []
    compose = composed.compose
    monkeypatch.setattr(composed, "compose", lambda *args: made.append(1) or compose(*args))
    images, texts = (torch.randn(n, 256, device=device).bfloat16() for n in (5, 9))
    changes = [
        lambda: head.image.weights[0].mul_(torch.randn(128, 256, device=device)),
        lambda: (head.contribution.matrices[1].mul_(2), head.contribution.w[1].add_(0.01)),
    ]
    with torch.no_grad(), esl_fast.use_backend("triton"):
        head(images, texts)
        assert len(made) == 2
        for change, expected in zip(changes, [3, 3], strict=True):
            change()
            found = head(images, texts)
            assert len(made) == expected
            with esl_fast.use_backend("torch"):
                wanted = head(images.float(), texts.float())
            assert error(found, wanted.double()) < 4 * ROUNDING
        assert torch.equal(head(images, texts), found)


def test_gradients_come_from_what_is_differentiable(head, device, monkeypatch):
    monkeypatch.setattr(composed, "aggregate_composed", lambda *args: pytest.fail("has no gradient"))
    images = torch.randn(5, 256, device=device).bfloat16()
    with esl_fast.use_backend("triton"):
        assert head.image_units(images).requires_grad
