"""Both sides in one step of autograd, against the ops one by one."""

import pytest
import torch
from torch.nn.utils import prune

import esl_fast
from esl_fast import ops
from esl_fast.model.heads import Head

AGGREGATORS = ["heuristic", "adaptive"]
WIDTH = 8


@pytest.fixture(autouse=True)
def kernels():
    with esl_fast.use_backend("triton"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """How often both sides were made in one step."""
    calls, sides = [], ops.sides
    monkeypatch.setattr(ops, "sides", lambda *args, **options: calls.append(1) or sides(*args, **options))
    return calls


def make_head(aggregator, device):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(WIDTH, num_levels=2, aggregator=aggregator).to(device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return head


def gradients(head, sides, images, texts, use=(0, 1)):
    """Both sides and all gradients, what is weighed by numbers of its own."""
    found = sides(images, texts)
    used = [side for i, side in enumerate(found) if i in use and side.requires_grad]
    if not used:
        return found
    leaves = [t for t in (images, texts, *head.parameters()) if t.requires_grad]
    loss = sum((x.float() * torch.arange(x.numel(), device=x.device).view_as(x).sin()).sum() for x in used)
    return *found, *torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.requires_grad == b.requires_grad and torch.equal(a, b))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize(
    ("counts", "dtype"),
    [((3, 5), torch.float32), ((5, 3), torch.bfloat16), ((4, 4), torch.float32), ((0, 3), torch.float32)],
    ids=str,
)
def test_equals_the_ops_one_by_one(aggregator, counts, dtype, device, calls):
    head = make_head(aggregator, device)
    # Sliced out of something wider: rows are not contiguous.
    features = [torch.randn(n, 2 * WIDTH + 2, device=device).to(dtype)[:, 1:-1:2].requires_grad_() for n in counts]
    ours = gradients(head, head.sides, *features)
    assert len(calls) == 1
    assert_same(ours, gradients(head, lambda *pair: Head._sides(head, *pair), *features))


SUBSETS = {
    "features": lambda name: not name,
    "images": lambda name: name == "",
    "image aggregator": lambda name: name.startswith("image"),
    "text aggregator": lambda name: name.startswith("text"),
    "a matrix": lambda name: name == "contribution.matrices.1",
    "degrees": lambda name: name == "contribution.w",
}


@pytest.mark.parametrize(
    ("aggregator", "wanted", "use"),
    [
        *(("heuristic", name, (0, 1)) for name in SUBSETS),
        *(("heuristic", name, (side,)) for name in ("images", "degrees") for side in (0, 1)),
        *(("adaptive", name, (0, 1)) for name in ("features", "text aggregator")),
    ],
    ids=str,
)
def test_any_subset_of_gradients(aggregator, wanted, use, device, calls):
    head = make_head(aggregator, device)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(SUBSETS[wanted](name))
    features = [torch.randn(n, WIDTH, device=device).requires_grad_(SUBSETS[wanted]("")) for n in (5, 3)]
    ours = gradients(head, head.sides, *features, use=use)
    assert len(calls) == 1
    assert_same(ours, gradients(head, lambda *pair: Head._sides(head, *pair), *features, use=use))


def test_one_side_alone(device, calls):
    head = make_head("heuristic", device).requires_grad_(False)
    images, texts = torch.randn(5, WIDTH, device=device, requires_grad=True), torch.randn(3, WIDTH, device=device)
    assert [side.requires_grad for side in head.sides(images, texts)] == [True, False]
    with torch.no_grad():
        assert not any(side.requires_grad for side in head.sides(images, texts))
    assert len(calls) == 1  # without gradients there is nothing to be saved


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_autocast_changes_nothing(aggregator, device):
    head = make_head(aggregator, device)
    features = [torch.randn(n, WIDTH, device=device, requires_grad=True) for n in (5, 3)]
    expected = gradients(head, head.sides, *features)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same(gradients(head, head.sides, *features), expected)


def test_sides_may_be_written_to(device):
    head = make_head("heuristic", device)
    features = [torch.randn(n, WIDTH, device=device, requires_grad=True) for n in (5, 3)]
    single, doubled = (
        torch.autograd.grad(sum(side.mul_(factor).sum() for side in head.sides(*features)), features)
        for factor in (1, 2)
    )
    # On a GPU another layout of the gradient is another order of summing.
    bounds = {} if device.type == "cuda" else {"rtol": 0, "atol": 0}
    for a, b in zip(single, doubled, strict=True):
        torch.testing.assert_close(2 * a, b, **bounds)


def test_second_derivatives_are_refused(device):
    head = make_head("heuristic", device)
    features = [torch.randn(n, WIDTH, device=device, requires_grad=True) for n in (5, 3)]
    first = torch.autograd.grad(head.sides(*features)[0].square().sum(), features[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()


class Doubled(esl_fast.ESLHead):
    def image_units(self, x):
        return 2 * super().image_units(x)


def test_what_is_overridden_or_observed_is_called(device, calls):
    features = [torch.randn(n, WIDTH, device=device) for n in (3, 5)]
    head, doubled = make_head("heuristic", device), Doubled(WIDTH, num_levels=2).to(device)
    doubled.load_state_dict(head.state_dict())
    expected = head.sides(*features)[0]
    torch.testing.assert_close(doubled.sides(*features)[0], 2 * expected)
    seen = []
    head.text.register_forward_hook(lambda *call: seen.append(1))
    assert torch.equal(head.sides(*features)[0], expected)
    assert len(seen) == len(calls) == 1


class Wrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def test_what_replaces_an_aggregator_is_called(device, calls):
    features = [torch.randn(n, WIDTH, device=device) for n in (3, 5)]
    head = make_head("heuristic", device)
    expected, forward = head.sides(*features), head.image.forward
    head.image.forward = lambda *args: 2 * forward(*args)
    torch.testing.assert_close(head.sides(*features)[0], 2 * expected[0])
    del head.image.forward
    head.image = Wrapped(head.image)
    torch.testing.assert_close(head.sides(*features), expected)
    assert len(calls) == 1


def test_what_replaces_the_folding_is_called(device, calls):
    features = [torch.randn(n, WIDTH, device=device) for n in (3, 5)]
    head = make_head("heuristic", device)
    forward = head.contribution.forward
    head.contribution.forward = lambda *args: 3 * forward(*args)
    folded = head.sides(*features)[0]
    del head.contribution.forward
    torch.testing.assert_close(folded, 3 * head.sides(*features)[0])
    assert len(calls) == 1


def test_parameters_are_found_by_name(device):
    features = [torch.randn(n, WIDTH, device=device) for n in (3, 5)]
    head = make_head("adaptive", device)
    expected = head(*features)
    prune.identity(head.contribution.matrices, "0")
    torch.testing.assert_close(head(*features), expected)
    prune.remove(head.contribution.matrices, "0")  # which makes it the last to be listed
    torch.testing.assert_close(head(*features), expected)


def test_no_level_at_all(device):
    for aggregator in AGGREGATORS:
        head = esl_fast.ESLHead(WIDTH, num_levels=0, aggregator=aggregator).to(device)
        features = [torch.randn(n, WIDTH, device=device, requires_grad=True) for n in (3, 5)]
        scores = head(*features)
        with esl_fast.use_backend("torch"):
            expected = head(*features)
        torch.testing.assert_close(scores, expected)
        grads, wanted = (torch.autograd.grad(s.sin().sum(), features) for s in (scores, expected))
        torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("name", ["image", "matrices"])
def test_what_does_not_fit_is_named(name, device):
    head = make_head("adaptive", device)
    weights = head.image.weights if name == "image" else head.contribution.matrices
    weights[1] = torch.nn.Parameter(torch.ones(5, WIDTH // 2, device=device))
    with pytest.raises(ValueError, match=r"level 2 has a matrix of shape|do not fit 3 levels"):
        head(torch.randn(3, WIDTH, device=device), torch.randn(5, WIDTH, device=device))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_features_of_other_kinds(aggregator, device, calls):
    head, good = make_head(aggregator, device), torch.randn(5, WIDTH, device=device)
    for bad, error in ((good.int(), TypeError), (good.tolist(), TypeError), (good.view(1, 5, WIDTH), ValueError)):
        with pytest.raises(error):
            head.sides(bad, good)
        with pytest.raises(error):
            head.sides(good, bad)
    assert not calls


def test_mixed_dtypes(device, calls):
    head = make_head("heuristic", device)
    images, texts = torch.randn(3, WIDTH, device=device).bfloat16(), torch.randn(5, WIDTH, device=device)
    assert {side.dtype for side in head.sides(images, texts)} == {torch.float32}
    assert not calls
