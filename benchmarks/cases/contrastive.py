"""The symmetric contrastive loss, forward and backward, from finished units."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import esl_fast
from benchmarks.cases import common
from benchmarks.registry import DTYPES, TOLERANCE, Case, Parity, Problem

LOGIT_SCALE = 1 / 0.07
BLOCK_ELEMENTS = 1 << 26


def from_matrix(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as everybody writes it."""
    logits = scale.to(images.dtype) * images @ texts.mT
    labels = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.mT, labels)) / 2


def step(loss, images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    images, texts, scale = (t.detach().requires_grad_() for t in (images, texts, scale))
    value = loss(images, texts, scale)
    return value.detach(), *torch.autograd.grad(value, (images, texts, scale))


def exact_step(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """:func:`step` of the definition in float64 with the gradient written out, so that no size is too large."""
    images, texts, scale = images.double(), texts.double(), scale.double()
    n = len(images)
    blocks = torch.arange(n, device=images.device).split(max(1, BLOCK_ELEMENTS // n))
    row_lse, column_lse = images.new_empty(n), images.new_full((n,), -torch.inf)
    for rows in blocks:
        logits = scale * images[rows] @ texts.mT
        row_lse[rows] = logits.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    loss = (row_lse + column_lse).mean() / 2 - scale * torch.linalg.vecdot(images, texts).mean()
    d_images, d_texts, d_scale = torch.empty_like(images), torch.zeros_like(texts), torch.zeros_like(scale)
    for rows in blocks:
        scores = images[rows] @ texts.mT
        d_logits = torch.exp(scale * scores - row_lse[rows, None]) + torch.exp(scale * scores - column_lse)
        d_logits[torch.arange(len(rows), device=rows.device), rows] -= 2
        d_logits /= 2 * n
        d_images[rows] = scale * d_logits @ texts
        d_texts += scale * d_logits.mT @ images[rows]
        d_scale += (d_logits * scores).sum()
    return loss, d_images, d_texts, d_scale


def contrastive_loss(device: torch.device, dtype: str, n: int, m: int) -> Problem:
    images = normalize(torch.randn(n, common.PRODUCT_UNITS, device=device))
    # So weak a resemblance that the loss is no small difference of large numbers.
    texts = normalize(0.3 * images + normalize(torch.randn(m, common.PRODUCT_UNITS, device=device)))
    images, texts = images.to(DTYPES[dtype]), texts.to(DTYPES[dtype])
    scale = torch.tensor(LOGIT_SCALE, device=device)
    compiled = common.compiled(from_matrix)

    def parity() -> Parity:
        error = common.relative_error(ours(), exact_step(images, texts, scale))
        return Parity(error, TOLERANCE[dtype], "loss and all gradients")

    def ours() -> tuple[Tensor, ...]:
        return step(esl_fast.contrastive_loss, images, texts, scale)

    def four_products() -> None:
        logits = images @ texts.mT
        torch.mm(images, texts.mT, out=logits)
        torch.mm(logits, texts, out=out)
        torch.mm(logits.mT, images, out=out)

    out = torch.empty_like(images)
    return Problem(
        {
            "ours": ours,
            "pytorch": lambda: step(from_matrix, images, texts, scale),
            "compiled": lambda: step(compiled, images, texts, scale),
            "limit": four_products,
        },
        parity,
        8.0 * n * m * common.PRODUCT_UNITS,
    )


def cases(device: str) -> list[Case]:
    measured = ("ours", "pytorch")
    if device == "cpu":
        return [
            Case(contrastive_loss, 64, 64, quick=True),
            *(Case(contrastive_loss, n, n, memory=measured) for n in (2048, 8192)),
        ]
    return [
        Case(contrastive_loss, 32_768, 32_768, "bfloat16", memory=measured, quick=True),
        *(Case(contrastive_loss, n, n, "bfloat16", quick=n == 8192) for n in (8192, 1024, 64)),
        Case(contrastive_loss, 65_536, 65_536, "bfloat16", memory=measured),
        *(Case(contrastive_loss, 8192, 8192, dtype) for dtype in ("float16", "tf32", "float32")),
    ]
