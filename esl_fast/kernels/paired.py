"""Scores of given pairs, to the bit those that the all-pairs kernels compute.

A program takes 64 texts and the image of each, and keeps the diagonal of their product: 64 times the arithmetic of the
dot products alone, but by the same instructions in the same order as a tile of `tile.tile_product`, so that a
score may be compared with one of a tile, and equal items tie.

Paper, 25,000 pairs of 1,022 units, bf16: 3.3 GFLOP, 4.1 us at 790 TFLOP/s; 102 MB, 21 us at 4.8 TB/s if no image were
found in L2, and 13 us if all five captions of an image share it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import TARGETS, CompileCase
from esl_fast.kernels._common import cdiv
from esl_fast.kernels._launch import launch
from esl_fast.kernels.plan import Plan, dot_precision, launch_options, tile_config, tile_constants
from esl_fast.kernels.tile import row_product

PAIRS = 64


@triton.jit(do_not_specialize=["images", "pairs", "units"])
def _paired_kernel(
    a, b, owners, scores, best, ranks, factor, lowest, images, pairs, units, a_row, a_unit, b_row, b_unit,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr, OWNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """With ``OWNED``, scores that are not finite become -inf, as do those with owners that are none of ``images``;
    ``best`` takes each image's highest, and its rank gets to ``pairs - 1``; else ``lowest``, if not None, takes the
    lowest score times ``factor``."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    live = pair < pairs
    image = pair
    known = live
    if OWNED:
        image = tl.load(owners + pair, mask=live, other=0).to(tl.int64)
        known = live & (image >= 0) & (image < images)
    x_row = a + tl.where(known, image, 0)[:, None] * a_row
    y_row = b + tl.where(live, pair, 0)[:, None] * b_row
    acc = tl.zeros((PAIRS, PAIRS), tl.float32)
    acc = row_product(acc, x_row, y_row, units, a_unit, b_unit, DEPTH, PRECISION, UPCAST)
    index = tl.arange(0, PAIRS)
    own = tl.sum(tl.where(index[:, None] == index[None, :], acc, 0.0), 0)
    if OWNED:
        own = tl.where(known & (tl.abs(own) < float("inf")), own, float("-inf"))
        tl.atomic_max(best + image, own, mask=known, sem="relaxed")
        tl.store(ranks + image, pairs.to(tl.int64) - 1 + image * 0, mask=known)
    elif lowest is not None:
        least = tl.min(tl.where(live, own * tl.load(factor).to(tl.float32), float("inf")), 0)
        tl.atomic_min(lowest + index * 0, least + index * 0.0, mask=index == 0, sem="relaxed")
    tl.store(scores + pair, own, mask=live)


def paired_scores(plan: Plan, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores ``(min(N, M),)``, float32, of image i with text i, and with ``factor ()`` the lowest of them times it.

    ``plan`` is that of the all-pairs product with whose scores these are to be compared.
    """
    device = plan.tensors[0].device
    scores = torch.empty(min(plan.n, plan.m), dtype=torch.float32, device=device)
    lowest = None if factor is None else torch.full((), torch.inf, dtype=torch.float32, device=device)
    _launch(plan, None, scores, None, None, factor, lowest)
    return scores, lowest


def score_owned(plan: Plan, owners: Tensor, scores: Tensor, best: Tensor, ranks: Tensor) -> None:
    """Write the score of each text with its image ``owners (M,)`` to ``scores``, and the best of each image that has
    texts to ``best``, which holds -inf; that image's place in ``ranks`` becomes M - 1.

    A score that is not finite becomes -inf, as does that of an owner which is no image.
    """
    _launch(plan, owners, scores, best, ranks, None, None)


def _launch(
    plan: Plan,
    owners: Tensor | None,
    scores: Tensor,
    best: Tensor | None,
    ranks: Tensor | None,
    factor: Tensor | None,
    lowest: Tensor | None,
) -> None:
    n, m, units, *strides = plan.sizes
    pairs = min(n, m) if owners is None else m
    constants = {key: plan.constants[key] for key in ("DEPTH", "PRECISION", "UPCAST")}
    launch(
        _paired_kernel, (cdiv(pairs, PAIRS), 1, 1),
        (*plan.tensors, owners, scores, best, ranks, factor, lowest, n, pairs, units, *strides),
        {
            "PAIRS": PAIRS, "OWNED": owners is not None, **constants,
            **launch_options(plan.config) | {"num_warps": 4},
        },
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    pairs, units = 25_000, 1_022  # COCO 5K
    sizes = dict.fromkeys(("images", "pairs", "units", "a_row", "b_row"), "i32")
    names = ("owners", "best", "ranks", "factor", "lowest")
    owned = {"owners": "*i64", "best": "*fp32", "ranks": "*i64"}
    diagonal = {"factor": "*fp32", "lowest": "*fp32"}
    found = []
    for target in TARGETS:
        for dtype in (torch.bfloat16, torch.float32):
            precision = dot_precision(dtype)
            config = tile_config(target, precision, False)
            kind = "bf16" if dtype == torch.bfloat16 else "fp32"
            constants = tile_constants(config, precision, target, tma=False)
            found += (
                CompileCase(
                    name=f"paired_25k_{name}_{precision}",
                    kernel=_paired_kernel,
                    signature={"a": f"*{kind}", "b": f"*{kind}", "scores": "*fp32", **pointers, **sizes},
                    constexprs={
                        "a_unit": 1, "b_unit": 1, "PAIRS": PAIRS, "OWNED": name == "owned",
                        **{key: None for key in names if key not in pointers},
                        **{key: constants[key] for key in ("DEPTH", "PRECISION", "UPCAST")},
                    },
                    num_warps=4,
                    num_stages=config.num_stages,
                    divisible=("a", "b", "scores", *pointers, "a_row", "b_row"),
                    wants_wgmma=target == "sm_90",
                    flops=2.0 * pairs * PAIRS * units,
                    bytes=1.2 * dtype.itemsize * pairs * units,
                    precision=precision,
                    targets=(target,),
                )
                for name, pointers in (("owned", owned), ("diagonal", diagonal), ("small_diagonal", {}))
            )  # fmt: skip
    return found
