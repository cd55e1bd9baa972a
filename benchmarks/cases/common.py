"""Inputs, the definition as people write it, and comparisons, shared by the cases."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from esl_fast import ESLHead, reference
from esl_fast.model.parts import CHAIN

EMBED_DIM = 512
UNITS = sum(reference.aggregate.level_dims(EMBED_DIM, 2, 8))
PRODUCT_UNITS = 1024  # width of the bare product: the next that matrix units like
SAMPLE = 256  # rows (or columns) compared where the float64 result would be too large
AGGREGATORS = ("heuristic", "adaptive")


def make_head(aggregator: str, device: torch.device) -> ESLHead:
    """A head whose levels contribute differently, as after training."""
    head = ESLHead(EMBED_DIM, aggregator=aggregator)
    with torch.no_grad():
        head.contribution.w += 0.02 * torch.rand_like(head.contribution.w)
        for matrix in head.contribution.matrices:
            matrix += 0.1 * torch.randn_like(matrix) / matrix.shape[0] ** 0.5
    return head.to(device)


def make_features(n: int, m: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Raw features of n images and of m captions that resemble their images, and whose captions they are."""
    owners = torch.arange(m, device=device) * n // m
    images = torch.randn(n, EMBED_DIM, device=device)
    texts = images[owners] + 2 * torch.randn(m, EMBED_DIM, device=device)
    return images.to(dtype), texts.to(dtype), owners


@torch.no_grad()
def make_sides(n: int, m: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides of the similarity as a head lays them out, and owners."""
    images, texts, owners = make_features(n, m, device, dtype)
    return *make_head("heuristic", device).eval().sides(images, texts), owners


def by_level(head: ESLHead, images: Tensor, texts: Tensor) -> Tensor:
    """Similarity ``(N, M)`` exactly as the definition reads: nothing folded, nothing kept, a product a level."""
    units = []
    for features, aggregator, side in ((images, head.image, "image"), (texts, head.text, "text")):
        if head.aggregator == "heuristic":
            weights = aggregator.weight.sum(1).unbind()
        else:
            weights = [reference.aggregate.select_top2(w) for w in aggregator.weights]
        units.append(reference.aggregate.aggregate(features, weights, chain=CHAIN[side]))
    return reference.similarity.similarity_by_level(*units, list(head.contribution.matrices), head.degrees())


def exact(head: ESLHead) -> ESLHead:
    return copy.deepcopy(head).double()


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """What ESL is compared with: CLIP's similarity."""
    return normalize(images, dim=-1) @ normalize(texts, dim=-1).mT


def bare_product(n: int, m: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    a = torch.randn(n, PRODUCT_UNITS, device=device, dtype=dtype)
    b = torch.randn(m, PRODUCT_UNITS, device=device, dtype=dtype)
    return lambda: a @ b.mT


def compiled(function: Callable) -> Callable:
    """``torch.compile(function)``, at the first call: most runs never ask for it."""

    @functools.cache
    def get() -> Callable:
        return torch.compile(function, dynamic=False)

    return lambda *args: get()(*args)


def sample(n: int, device: torch.device) -> tuple[Tensor, str]:
    """Some of ``range(n)``, and how many in words."""
    chosen = torch.randperm(n, device=device)[:SAMPLE].sort().values
    return chosen, f"all {n}" if n <= SAMPLE else f"{SAMPLE} random of {n}"


def relative_error(results: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Largest difference over the largest value, of the tensor where that is worst."""
    if isinstance(results, Tensor):
        results, expected = [results], [expected]
    pairs = zip(results, expected, strict=True)
    return max(float((r.double() - e).abs().max() / e.abs().max()) for r, e in pairs)


def scalars_together(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with those of vectors and single numbers as one: the largest of them says what is small."""
    few = torch.cat([g.reshape(-1) for g in gradients if g.ndim < 2])
    return [*(g for g in gradients if g.ndim >= 2), few]
