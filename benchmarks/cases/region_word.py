"""Region-word similarity from finished units: forward, and forward with backward."""

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize, pad

from benchmarks.cases import common
from benchmarks.registry import DTYPES, TOLERANCE, Case, Parity, Problem
from esl_fast import reference
from esl_fast.ops import region_word as op
from esl_fast.reference.region_word import EPS, SLOPE
from esl_fast.reference.region_word import region_word_similarity as definition

REGIONS = 36
WORDS = (8, 20)  # a caption
SMOOTH = 9.0
COMPARED = 16  # images and captions, where all would take the definition too long
LOOPED = 1_000_000  # pairs; the loop takes minutes beyond
PRODUCT_ROWS = 8192  # words whose bare products are held at a time


def make_units(n: int, m: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Regions ``(N, R, U)``, words ``(M, W, U)`` with the contributions folded in, word lengths ``(M,)`` on the CPU."""
    taps = torch.tensor([[0.8, 0.4]] * 8, device=device).unbind()
    both = []
    for count, length in ((n, REGIONS), (m, WORDS[1])):
        units = torch.empty(count, length, common.UNITS, device=device, dtype=dtype)
        for block in units.split(1000):
            vectors = normalize(torch.randn(*block.shape[:2], common.EMBED_DIM, device=device), dim=-1)
            block.copy_(reference.aggregate.aggregate(vectors, taps, chain="raw", normalize=False))
        both.append(units)
    lengths = torch.randint(WORDS[0], WORDS[1] + 1, (m,))  # where a data loader leaves them
    return both[0], both[1].div_(3), lengths


def by_caption(regions: Tensor, words: Tensor, smooth: Tensor, lengths: Tensor) -> Tensor:
    """As the official code does it: a loop over captions, each repeated for every image."""
    columns = []
    for caption, length in zip(words, lengths.tolist(), strict=True):
        repeated = caption[:length].unsqueeze(0).repeat(len(regions), 1, 1)
        a = torch.bmm(repeated, regions.mT)
        columns.append(_attend(a, smooth))
    return torch.stack(columns, 1)


def _attend(a: Tensor, smooth: Tensor) -> Tensor:
    b = leaky_relu(torch.tanh(a), SLOPE)
    to_regions = torch.softmax(smooth * b / (b.norm(dim=1, keepdim=True) + EPS), dim=2)
    to_words = torch.softmax(smooth * b / (b.norm(dim=2, keepdim=True) + EPS), dim=1)
    return (a * to_regions).sum(2).mean(1) + (a * to_words).sum(1).mean(1)


def batched(regions: Tensor, words: Tensor, smooth: Tensor, lengths: Tensor) -> Tensor:
    """All pairs at once, padded words masked."""
    lengths = lengths.to(words.device)
    real = torch.arange(words.shape[1], device=words.device) < lengths[:, None]
    a = torch.einsum("mwu,nru->nmwr", words, regions)
    b = leaky_relu(torch.tanh(a), SLOPE) * real[..., None]
    to_regions = torch.softmax(smooth * b / (b.norm(dim=2, keepdim=True) + EPS), dim=3)
    logits = smooth * b / (b.norm(dim=3, keepdim=True) + EPS)
    to_words = torch.softmax(logits.masked_fill(~real[..., None], -torch.inf), dim=2)
    words_mean = ((a * to_regions).sum(3) * real).sum(2) / lengths
    return words_mean + (a * to_words).sum(2).mean(2)


def bare_operands(regions: Tensor, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What the bare product multiplies: words without padding, regions; of as many units as cuBLAS likes."""
    real = torch.arange(words.shape[1]) < lengths[:, None]
    wider = common.PRODUCT_UNITS - common.UNITS
    return pad(words[real.to(words.device)], (0, wider)), pad(regions.flatten(0, 1), (0, wider))


def region_word(device: torch.device, dtype: str, n: int, m: int) -> Problem:
    regions, words, lengths = make_units(n, m, device, DTYPES[dtype])
    arguments = regions, words, torch.tensor(SMOOTH, device=device), lengths
    compiled = common.compiled(batched)

    def parity() -> Parity:
        images, captions = (torch.randperm(size, device=device)[:COMPARED] for size in (n, m))
        some = lengths[captions.cpu()].to(device)
        expected = definition(regions[images].double(), words[captions].double(), SMOOTH, some)
        error = common.relative_error(ours()[images][:, captions], expected)
        return Parity(error, TOLERANCE[dtype], f"{len(images)} of {n} images x {len(captions)} of {m} captions")

    def ours() -> Tensor:
        return op.region_word_similarity(*arguments)

    def product() -> None:
        for rows in real_words.split(PRODUCT_ROWS):
            torch.mm(rows, all_regions.mT, out=out[: len(rows)])

    real_words, all_regions = bare_operands(regions, words, lengths)
    out = words.new_empty(min(PRODUCT_ROWS, len(real_words)), len(all_regions))
    competitors = {
        "ours": ours,
        "loop": lambda: by_caption(*arguments),
        "batched": lambda: batched(*arguments),
        "compiled": lambda: compiled(*arguments),
        "limit": product,
    }
    if n * m > LOOPED:
        del competitors["loop"]
    return Problem(competitors, torch.no_grad()(parity), 2.0 * len(real_words) * len(all_regions) * common.UNITS)


def region_word_step(device: torch.device, dtype: str, n: int, m: int) -> Problem:
    """Forward and backward: gradients of both units and of the temperature."""
    regions, words, lengths = make_units(n, m, device, DTYPES[dtype])
    smooth, grad = torch.tensor(SMOOTH, device=device), torch.randn(n, m, device=device)
    compiled = common.compiled(batched)

    def step(similarity, regions, words, smooth, grad) -> tuple[Tensor, ...]:
        leaves = tuple(t.detach().requires_grad_() for t in (regions, words, smooth))
        result = similarity(*leaves, lengths)
        return torch.autograd.grad(result, leaves, grad.to(result.dtype))

    def run(similarity) -> tuple[Tensor, ...]:
        return step(similarity, regions, words, smooth, grad)

    def ours() -> tuple[Tensor, ...]:
        return run(op.region_word_similarity)

    def parity() -> Parity:
        expected = step(by_caption, regions.double(), words.double(), smooth.double(), grad.double())
        return Parity(common.relative_error(ours(), expected), 5 * TOLERANCE[dtype], "all gradients")

    real_words, all_regions = bare_operands(regions, words, lengths)

    def four_products() -> None:
        products = real_words @ all_regions.mT
        torch.mm(real_words, all_regions.mT, out=products)
        _ = products @ all_regions, products.mT @ real_words

    return Problem(
        {
            "ours": ours,
            "loop": lambda: run(by_caption),
            "batched": lambda: run(batched),
            "compiled": lambda: run(compiled),
            "limit": four_products,
        },
        parity,
        8.0 * len(real_words) * len(all_regions) * common.UNITS,
    )


def cases(device: str) -> list[Case]:
    measured = ("ours", "loop", "batched")
    if device == "cpu":
        return [
            Case(region_word, 100, 100, memory=measured, quick=True),
            Case(region_word, 1000, 5000, memory=("ours",), timed=False),
            Case(region_word_step, 32, 32),
        ]
    return [
        Case(region_word, 1000, 5000, "bfloat16", memory=("ours", "batched"), quick=True),
        Case(region_word_step, 128, 128, "bfloat16", quick=True),
        Case(region_word, 10_000, 50_000, "bfloat16", memory=("ours",), quick=True),
        Case(region_word, 5000, 25_000, "bfloat16"),
        *(Case(region_word, 1000, 5000, dtype) for dtype in ("float16", "tf32", "float32")),
        Case(region_word, 100, 100, "bfloat16"),
    ]
