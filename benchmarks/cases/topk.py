"""The k best gallery items of each query, from finished units."""

import torch
from torch import Tensor

import esl_fast
from benchmarks.cases import common
from benchmarks.registry import DTYPES, TOLERANCE, Case, Parity, Problem


def topk(device: torch.device, dtype: str, n: int, m: int, k: int) -> Problem:
    queries, gallery, _ = common.make_sides(n, m, device, DTYPES[dtype])

    def ours() -> tuple[Tensor, Tensor]:
        return esl_fast.topk(queries, gallery, k)

    def parity() -> Parity:
        rows, compared = common.sample(n, device)
        exact = queries[rows].double() @ gallery.double().mT
        best = exact.topk(k).values
        scores, items = (result[rows] for result in ours())
        error = common.relative_error([scores, exact.gather(1, items)], [best, best])
        return Parity(error, TOLERANCE["tf32" if dtype == "tf32" else "float32"], f"{compared} queries")

    return Problem(
        {
            "ours": ours,
            "pytorch": lambda: (queries @ gallery.mT).topk(k),
            "limit": common.bare_product(n, m, device, DTYPES[dtype]),
        },
        parity,
        2.0 * n * m * common.UNITS,
    )


def cases(device: str) -> list[Case]:
    measured = ("ours", "pytorch")
    if device == "cpu":
        return [Case(topk, 1000, 25_000, options={"k": 10}, memory=measured)]
    return [Case(topk, 10_000, 500_000, "bfloat16", {"k": 10}, ("ours",))]
