"""The head, from raw features: similarity, and a forward and backward pass. The product of finished units."""

import copy
import functools

import torch

from benchmarks.cases import common
from benchmarks.registry import DTYPES, TOLERANCE, Case, Parity, Problem
from esl_fast import ops


def similarity(device: torch.device, dtype: str, n: int, m: int, aggregator: str) -> Problem:
    """Raw features to the matrix, both sides aggregated and one folded."""
    head = common.make_head(aggregator, device).eval()
    naive_head = copy.deepcopy(head).to(DTYPES[dtype])
    images, texts, _ = common.make_features(n, m, device, DTYPES[dtype])
    by_level = common.compiled(common.by_level)

    def parity() -> Parity:
        rows, compared = common.sample(n, device)
        expected = common.by_level(common.exact(head), images[rows].double(), texts.double())
        return Parity(common.relative_error(ours()[rows], expected), TOLERANCE[dtype], f"{compared} rows")

    no_grad = torch.no_grad()
    ours = no_grad(lambda: head(images, texts))
    return Problem(
        {
            "ours": ours,
            "pytorch": no_grad(lambda: common.by_level(naive_head, images, texts)),
            "compiled": no_grad(lambda: by_level(naive_head, images, texts)),
            "cosine": lambda: common.cosine(images, texts),
            "limit": common.bare_product(n, m, device, DTYPES[dtype]),
        },
        no_grad(parity),
        2.0 * n * m * common.UNITS,
    )


def product(device: torch.device, dtype: str, n: int, m: int) -> Problem:
    """Finished units to the matrix."""
    images, texts, _ = common.make_sides(n, m, device, DTYPES[dtype])

    def parity() -> Parity:
        rows, compared = common.sample(n, device)
        error = common.relative_error(ours()[rows], images[rows].double() @ texts.double().mT)
        return Parity(error, TOLERANCE[dtype], f"{compared} rows")

    def ours() -> torch.Tensor:
        return ops.similarity(images, texts)

    limit = common.bare_product(n, m, device, DTYPES[dtype])
    return Problem({"ours": ours, "limit": limit}, parity, 2.0 * n * m * common.UNITS)


def head_step(device: torch.device, dtype: str, n: int, m: int, aggregator: str) -> Problem:
    """Forward and backward of the head: gradients of both features and of every parameter."""
    head = common.make_head(aggregator, device).train()
    naive_head = copy.deepcopy(head).to(DTYPES[dtype])
    images, texts, _ = common.make_features(n, m, device, DTYPES[dtype])
    grad = torch.randn(n, m, device=device).to(DTYPES[dtype])
    by_level = common.compiled(common.by_level)

    def step(forward, head, x, y, grad) -> tuple[torch.Tensor, ...]:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        return torch.autograd.grad(forward(head, x, y), (x, y, *head.parameters()), grad)

    def ours() -> tuple[torch.Tensor, ...]:
        return step(lambda head, x, y: head(x, y), head, images, texts, grad)

    def cosine() -> tuple[torch.Tensor, ...]:
        x, y = images.detach().requires_grad_(), texts.detach().requires_grad_()
        return torch.autograd.grad(common.cosine(x, y), (x, y), grad)

    def parity() -> Parity:
        expected = step(common.by_level, common.exact(head), images.double(), texts.double(), grad.double())
        # Gradients sum over everything, with much cancellation, of a temperature sometimes almost complete.
        found = common.scalars_together(ours()), common.scalars_together(expected)
        return Parity(common.relative_error(*found), 5 * TOLERANCE[dtype], "all gradients")

    x = torch.randn(n, common.PRODUCT_UNITS, device=device, dtype=DTYPES[dtype])
    y = torch.randn(m, common.PRODUCT_UNITS, device=device, dtype=DTYPES[dtype])
    leaves = images.detach().requires_grad_(), texts.detach().requires_grad_()

    @functools.cache
    def module() -> torch.nn.Module:
        return torch.cuda.make_graphed_callables(copy.deepcopy(head), leaves)

    def graphed() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module()(*leaves), (*leaves, *module().parameters()), grad)

    return Problem(
        {
            "ours": ours,
            **({"graphed": graphed} if device.type == "cuda" else {}),
            "pytorch": lambda: step(common.by_level, naive_head, images, texts, grad),
            "compiled": lambda: step(by_level, naive_head, images, texts, grad),
            "cosine": cosine,
            "limit": lambda: (x @ y.mT, grad @ y, grad.mT @ x),
        },
        parity,
        6.0 * n * m * common.UNITS,
    )


def cases(device: str) -> list[Case]:
    both = [{"aggregator": name} for name in common.AGGREGATORS]
    measured = ("ours", "pytorch")
    if device == "cpu":
        return [
            *(Case(similarity, 1000, 5000, options=o, memory=measured, quick=True) for o in both),
            *(Case(similarity, 5000, 25_000, options=o, memory=measured) for o in both),
            *(Case(head_step, 64, 64, options=o, quick=True) for o in both),
        ]
    heuristic = both[0]
    return [
        Case(product, 5000, 25_000, "bfloat16", quick=True),
        *(Case(product, 5000, 25_000, dtype) for dtype in ("float16", "tf32", "float32")),
        *(Case(similarity, 5000, 25_000, "bfloat16", o, measured if o is heuristic else (), quick=True) for o in both),
        *(Case(head_step, 64, 64, "bfloat16", o, quick=True) for o in both),
        *(Case(head_step, n, n, "bfloat16", o) for n in (1024, 8192) for o in both),
        *(Case(similarity, 5000, 25_000, dtype, heuristic) for dtype in ("float16", "tf32", "float32")),
        *(Case(similarity, 1000, 5000, "bfloat16", o) for o in both),
        *(Case(head_step, 64, 64, "float32", o) for o in both),
    ]
