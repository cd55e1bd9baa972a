"""The whole head and the loss through the kernels, against the golden files and against float64."""

from pathlib import Path

import pytest
import torch
from helpers import gradient_errors, load_golden

import esl_fast

GOLDEN = Path(__file__).parents[1] / "golden"


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    ours, expected = ours.double().cpu(), expected.double().cpu()
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["heuristic", "adaptive"])
def test_golden_similarity_loss_and_gradients(name, device):
    weights, golden = load_golden(GOLDEN / f"clip_{name}_d256_train.safetensors")
    head = esl_fast.ESLHead.from_official(weights).to(device)
    features = [golden[f"{side}_features"].to(device).requires_grad_() for side in ("image", "text")]
    scale = golden["logit_scale"].to(device).requires_grad_()
    with esl_fast.use_backend("triton"):
        scores = head.scores(*features)
        assert relative(scores.matrix().detach(), golden["similarity"]) <= 1e-5
        loss = esl_fast.contrastive_loss(*scores.factors(), scale.exp())
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)

    assert_golden_gradients(golden, head, *features, logit_scale=scale.grad)


@pytest.mark.parametrize("name", ["heuristic", "adaptive"])
def test_golden_region_word(name, device):
    weights, golden = load_golden(GOLDEN / f"region_word_{name}_d256_train.safetensors")
    head = esl_fast.RegionWordHead.from_official(weights).to(device)
    features = [golden[f"{side}_features"].to(device).requires_grad_() for side in ("image", "text")]
    with esl_fast.use_backend("triton"):
        scores = head(*features, golden["text_lengths"])
        assert relative(scores.detach(), golden["similarity"]) <= 1e-5
        scores.backward(golden["grad_output"].to(device))
    assert_golden_gradients(golden, head, *features)


def assert_golden_gradients(golden, head, images, texts, **others):
    ours = {"image_features": images.grad, "text_features": texts.grad, **others}
    # The official names of the gradients, by way of a head that holds them as weights.
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    ours |= head.to_official()
    expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    errors = gradient_errors({key: ours[key].cpu() for key in expected}, expected)
    assert max(errors.values()) <= 3e-4, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_on_any_subset(aggregator, wanted, device, poison):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(48, num_levels=3, aggregator=aggregator).to(device)
    # Sliced out of something wider: rows are not contiguous.
    wide = (torch.randn(n, 100, device=device) for n in (7, 13))
    images, texts = (t[:, 3:99:2].requires_grad_(w) for t, w in zip(wide, wanted, strict=True))
    inputs = [t for t in (images, texts) if t.requires_grad] + list(head.parameters())
    weight = torch.randn(7, 13, device=device)
    with esl_fast.use_backend("triton"):
        ours = torch.autograd.grad((head(images, texts) * weight).sum(), inputs)
    exact = head.double()
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in (images, texts)]
    with esl_fast.use_backend("torch"):
        inputs = [t for t in doubles if t.requires_grad] + list(exact.parameters())
        expected = torch.autograd.grad((exact(*doubles) * weight).sum(), inputs)
    largest = max(b.norm() for b in expected)
    for a, b in zip(ours, expected, strict=True):
        # Of the largest, since a gradient may vanish (a threshold that is a level's own weight).
        assert (a.double() - b).norm() <= 3e-5 * max(b.norm(), 1e-2 * largest)


def test_ranks_and_best_matches_agree_with_pytorch(device):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(32, num_levels=2).to(device)
    images, texts = torch.randn(11, 32, device=device), torch.randn(55, 32, device=device)
    owners = torch.arange(55, device=device) // 5
    results = []
    for backend in ("triton", "torch"):
        with esl_fast.use_backend(backend), torch.no_grad():
            sides = head.sides(images, texts)
            results.append((*esl_fast.retrieval_ranks(*sides, owners), esl_fast.topk(*sides, 7)[1]))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_transforms_see_through(aggregator, device):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(16, num_levels=2, aggregator=aggregator).to(device).requires_grad_(False)
    images, texts, direction = torch.randn(5, 16, device=device), torch.randn(7, 16, device=device), torch.ones(5, 16)
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(head(leaf, texts).sum(), leaf)

    def total(x):
        return head(x, texts).sum()

    torch.testing.assert_close(torch.func.grad(total)(images), expected)
    _, slope = torch.func.jvp(total, (images,), (direction.to(device),))
    torch.testing.assert_close(slope, expected.sum())
    torch.testing.assert_close(torch.vmap(total)(images[:, None]).sum(), head(images, texts).sum())


def test_a_second_gradient_is_refused(device):
    head = esl_fast.ESLHead(16, num_levels=2).to(device)
    images, texts = (torch.randn(n, 16, device=device, requires_grad=True) for n in (5, 7))
    gradients = torch.autograd.grad(head(images, texts).sum(), [images, head.contribution.w], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        sum(gradient.square().sum() for gradient in gradients).backward()
