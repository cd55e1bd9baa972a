"""Leaving out levels at inference, with a bound that holds."""

import pytest
import torch

import esl_fast


def sparse_head(aggregator: str, seed: int = 0) -> esl_fast.ESLHead:
    torch.manual_seed(seed)
    head = esl_fast.ESLHead(64, num_levels=4, aggregator=aggregator).double()
    with torch.no_grad():
        head.contribution.w.copy_(torch.tensor([0.9, -0.02, 0.6, 0.01, -0.3]))
        head.contribution.temp_scale_2.fill_(1.0)
        for matrix in head.contribution.matrices:
            matrix.copy_(torch.randn_like(matrix) / matrix.shape[0] ** 0.5)
    return head


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.02, 0.3, 100.0])
def test_the_bound_is_real(aggregator, tolerance):
    head = sparse_head(aggregator)
    images, texts = torch.randn(40, 64).double(), torch.randn(70, 64).double()
    whole = head(images, texts)
    scores, bound = esl_fast.similarity(images, texts, head, tolerance=tolerance)
    assert (scores - whole).abs().max() <= bound + 1e-15
    assert bound <= tolerance


def test_a_single_level_reaches_its_bound():
    """An embedding and itself meet an identity at the bound."""
    head = esl_fast.ESLHead(16, num_levels=1).double()
    with torch.no_grad():
        head.contribution.w.copy_(torch.tensor([0.01, 0.5]))
        head.contribution.temp_scale_2.zero_()
    narrowed = head.narrowed(float(head.contribution.bounds()[0]))
    assert narrowed.levels == [1]
    x = torch.randn(1, 16).double()
    difference = (head(x, x) - narrowed(x, x)).abs().item()
    assert difference == pytest.approx(narrowed.bound, rel=1e-4)


def test_the_product_narrows():
    head = sparse_head("heuristic")
    images, texts = torch.randn(5, 64).double(), torch.randn(7, 64).double()
    widths = [head.narrowed(t).sides(images, texts)[0].shape[1] for t in (0.0, 0.003, 0.02, 0.3, 100.0)]
    assert widths[0] == sum(head.dims)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == head.dims[0]
    assert head.narrowed(0.02).levels == [0, 2, 4]


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_is_not_negative(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        sparse_head("heuristic").narrowed(tolerance)


NAMES = ["contribution.w", "contribution.matrices.2", "contribution.temp_scale_1", "text.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_no_bound_of_what_is_not_finite(name):
    head = sparse_head("heuristic")
    head.get_parameter(name).data.view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"{name} has non-finite values"):
        head.narrowed(0.3)


def test_no_bound_that_is_not_finite():
    head = sparse_head("heuristic")
    head.contribution.temp_scale_2.data.fill_(1000.0)
    with pytest.raises(ValueError, match="bounds of levels has non-finite values"):
        head.narrowed(0.3)


def test_what_is_replaced_on_a_narrowed_head_is_called():
    narrowed, images, texts = sparse_head("heuristic").eval().narrowed(0.3), torch.randn(3, 64), torch.randn(5, 64)
    scores = narrowed.scores
    narrowed.scores = lambda x, y: scores(x[:1], y)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert narrowed(images.double(), texts.double()).shape == (1, 5)


def test_the_drop_in_is_the_head():
    head = sparse_head("adaptive")
    images, texts = torch.randn(5, 64).double().requires_grad_(), torch.randn(7, 64).double()
    assert torch.equal(esl_fast.similarity(images, texts, head), head(images, texts))
    assert esl_fast.similarity(images, texts, head).requires_grad


def test_the_bounds_of_all_levels_left_out_count():
    head = sparse_head("heuristic")
    first, second, *_ = sorted(head.contribution.bounds().tolist())
    narrowed = head.narrowed(second + first / 2)  # either of them, not both
    assert narrowed.bound == pytest.approx(first)
    assert len(narrowed.levels) == 4


def test_heads_with_units_of_their_own_are_refused():
    class Doubled(esl_fast.ESLHead):
        def image_units(self, x):
            return 2 * super().image_units(x)

    patched = esl_fast.ESLHead(16, 2, 3)
    patched.fold = lambda units, side: units
    for head, name in ((Doubled(16, 2, 3), "image_units"), (patched, "fold")):
        with pytest.raises(TypeError, match=f"has its own {name}"):
            head.narrowed(0.1)
