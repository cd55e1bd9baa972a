"""What only a GPU can show; the kernels' arithmetic is tested in tests/kernels, on a GPU or interpreted."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import esl_fast
from benchmarks.cases.common import by_level
from esl_fast import reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = (97, 211)


def head_and_features(aggregator: str, dtype: torch.dtype, device: str = "cuda"):
    torch.manual_seed(0)
    head = esl_fast.ESLHead(512, aggregator=aggregator).to(device)
    return head, *(torch.randn(n, 512, device=device, dtype=dtype, requires_grad=True) for n in SIZES)


def paired_loss(head, images, texts):
    return esl_fast.contrastive_loss(*head.sides(images, texts[: len(images)]), 14.3)


def by_definition(head, images, texts):
    """Scores, and the gradients of :func:`paired_loss`, all in the dtype of the features and of the head."""
    scores = by_level(head, images, texts)
    logits, labels = 14.3 * scores[:, : len(images)], torch.arange(len(images), device=images.device)
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.mT, labels)) / 2
    return [scores.detach(), *torch.autograd.grad(loss, [images, texts, *head.parameters()])]


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_do_not_exceed_those_of_plain_pytorch(aggregator, dtype):
    head, images, texts = head_and_features(aggregator, dtype)
    loss = paired_loss(head, images, texts)
    ours = [head(images, texts).detach(), *torch.autograd.grad(loss, [images, texts, *head.parameters()])]
    naive = by_definition(copy.deepcopy(head).to(dtype), images, texts)
    doubles = [t.detach().double().requires_grad_() for t in (images, texts)]
    exact = by_definition(copy.deepcopy(head).double(), *doubles)
    largest = max(g.norm() for g in exact[1:])
    for found, plain, true in zip(ours, naive, exact, strict=True):
        floor = 1e-5 * max(true.norm(), 1e-2 * largest)
        # A few numbers may be lucky: those of plain PyTorch as well.
        slack = 1.5 if true.numel() > 100 else 4
        naive_error = (plain.double() - true).norm().nan_to_num(torch.inf)  # float16 overflows
        assert (found.double() - true).norm() <= slack * naive_error + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1])
def test_large_products_of_units_in_and_out_of_line(dtype, first):
    """Tiles by TMA, of rows as they are or of a copy."""
    torch.manual_seed(0)
    n, m = 600, 1301
    images, texts = ((torch.randn(k, 1023, device="cuda") / 32).to(dtype)[:, first:] for k in (n, m))
    owners = torch.randint(0, n, (m,), device="cuda")
    scores, exact = esl_fast.ops.similarity(images, texts).double(), images.double() @ texts.double().mT
    assert (scores - exact).norm() <= (1e-6 if dtype == torch.float32 else 2e-3) * exact.norm()
    found = esl_fast.retrieval_ranks(images, texts, owners)
    expected = reference.ranks.retrieval_ranks(exact, owners)
    for mine, theirs in zip(found, expected, strict=True):  # two scores nearer than float32 tells may change places
        assert (mine - theirs).abs().max() <= 1
        assert (mine != theirs).double().mean() < 0.01
    images, texts = images[:513], texts[:513]
    loss = esl_fast.contrastive_loss(images, texts, 14.3)
    logits, labels = 14.3 * exact[:513, :513], torch.arange(513, device="cuda")
    torch.testing.assert_close(
        loss.double(), (cross_entropy(logits, labels) + cross_entropy(logits.mT, labels)) / 2, rtol=1e-5, atol=0
    )


def test_graphed_training_step_is_eager():
    head, images, texts = head_and_features("adaptive", torch.bfloat16)
    images, texts = images.detach().requires_grad_(), texts.detach().requires_grad_()
    grad = torch.randn(SIZES, device="cuda", dtype=torch.bfloat16)
    expected = torch.autograd.grad(head(images, texts), [images, texts, *head.parameters()], grad)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(head), (images, texts))
    found = torch.autograd.grad(graphed(images, texts), [images, texts, *graphed.parameters()], grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_nothing_waits_for_the_device(aggregator):
    head, images, texts = head_and_features(aggregator, torch.float32)
    owners = torch.arange(SIZES[1], device="cuda") % SIZES[0]
    paired_loss(head, images, texts).backward()  # compiles
    esl_fast.retrieval_ranks(*head.sides(images, texts), owners)
    torch.cuda.set_sync_debug_mode("error")
    try:
        paired_loss(head, images, texts).backward()
        esl_fast.retrieval_ranks(*head.sides(images, texts), owners)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_a_narrowed_head_waits_for_nothing(aggregator):
    head, images, texts = head_and_features(aggregator, torch.bfloat16)
    narrowed = head.eval().requires_grad_(False).narrowed(1.5 * head.contribution.bounds().min().item())
    assert len(narrowed.levels) < head.num_levels + 1
    images, texts = images.detach(), texts.detach()
    expected = narrowed(images, texts)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = narrowed(images, texts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_a_graph_is_not_made_of_lengths_on_the_host():
    regions, words = (torch.randn(3, 5, 64, device="cuda") for _ in range(2))
    smooth, lengths = torch.tensor(4.0, device="cuda"), torch.tensor([5, 2, 3])
    options = {"packing": esl_fast.ops.pack_captions(words, lengths)}
    esl_fast.ops.region_word_similarity(regions, words, smooth, lengths, **options)  # compiles
    for more in ({}, options | {"region_lengths": lengths}):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")  # a graph of something
            with pytest.raises(RuntimeError, match="a CUDA graph cannot read it"):
                esl_fast.ops.region_word_similarity(regions, words, smooth, lengths, **more)


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_compiled_is_eager(aggregator):
    head, images, texts = head_and_features(aggregator, torch.float32)
    compiled = torch.compile(lambda x, y: head(x, y), fullgraph=True)
    assert torch.equal(compiled(images, texts), head(images, texts))


@pytest.mark.parametrize(("aggregator", "copies"), [("heuristic", 1), ("adaptive", 1), ("adaptive", 30)])
def test_a_graph_replays(aggregator, copies):
    head, images, texts = head_and_features(aggregator, torch.bfloat16)
    head = head.eval().requires_grad_(False)
    images, texts = images.detach().repeat(copies, 1), texts.detach().repeat(copies, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        head(images, texts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = head(images, texts)
    images.copy_(torch.randn_like(images))
    graph.replay()
    expected = head(images, texts)
    if copies == 1:
        assert torch.equal(scores, expected)
    else:  # eager calls compose the adaptive levels of so many items, and round differently
        assert (scores - expected).double().norm() <= 1e-2 * expected.double().norm()


def test_runs_repeat_bit_by_bit():
    head, images, texts = head_and_features("adaptive", torch.bfloat16)
    first, second = (
        torch.autograd.grad(paired_loss(head, images, texts), [images, texts, *head.parameters()]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_takes_half_precision_features():
    head, images, texts = head_and_features("heuristic", torch.float32)
    linear = torch.nn.Linear(512, 512, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        scores = head(linear(images), linear(texts))
    assert scores.dtype == torch.bfloat16
    scores.float().sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("aggregator", ["heuristic", "adaptive"])
def test_alignment_is_looked_at_each_time(aggregator):
    head, images, texts = head_and_features(aggregator, torch.bfloat16)

    def step(offset: int):
        found = []
        for x in (images, texts):
            memory = torch.empty(x.numel() + 8, device="cuda", dtype=x.dtype)
            found.append(memory[offset : offset + x.numel()].view_as(x).copy_(x.detach()).requires_grad_())
        scores = head(*found)
        return scores, *torch.autograd.grad(scores.sum(), [*found, *head.parameters()])

    expected = step(0)
    for offset in (1, 2, 4, 8, 0):
        for a, b in zip(step(offset), expected, strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=2**-6, atol=1e-5 * b.float().norm().item() + 1e-6)


def test_loss_memory_is_linear():
    n, width = 32768, 1022
    sides = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    esl_fast.contrastive_loss(*sides, 0.1).backward()
    for side in sides:
        side.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    esl_fast.contrastive_loss(*sides, 0.1).backward()
    # The matrix alone would take 2 GB in bfloat16.
    assert torch.cuda.max_memory_allocated() - before < 1 << 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_any_device():
    head, images, texts = head_and_features("adaptive", torch.float32, "cuda:1")
    assert head(images, texts).device.index == 1
    paired_loss(head, images, texts).backward()
