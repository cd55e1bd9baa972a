"""All-pairs similarity, one matrix product whose tiles a persistent kernel writes.

The backward is two products with no epilogue to fuse, which is what cuBLAS is for, so it is plain `torch.mm`.

Paper, N x M x U multiply-adds: 2 N M U FLOP; (N + M) U read and N M written. COCO 5K (5,000 x 25,000 x 1,022, bf16):
255 GFLOP, 323 us at 790 TFLOP/s; 311 MB, 65 us at 4.8 TB/s: bound by arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from esl_fast.kernels._case import CompileCase
from esl_fast.kernels._common import on_device_of, padded_rows, widened
from esl_fast.kernels._launch import launch
from esl_fast.kernels._op import op
from esl_fast.kernels.plan import GROUP, Plan, check_operands, launch_options, make_plan, output, tile_cases
from esl_fast.kernels.tile import quarters, tile_origin, tile_product


@triton.jit(do_not_specialize=["n", "m", "units", "out_row"])
def _similarity_kernel(
    a, b, out, n, m, units, a_row, a_unit, b_row, b_unit, out_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(n, ROWS)
    col_blocks = tl.cdiv(m, COLS)
    # Rows of `out` are padded, and the padding is written too: stores then need no narrow tail.
    stride = tl.multiple_of(out_row.to(tl.int64), 16)
    first = tl.program_id(0)
    for tile in tl.range(first, row_blocks * col_blocks, tl.num_programs(0), flatten=FLATTEN):
        row, col = tile_origin(tile, row_blocks, col_blocks, ROWS, COLS, GROUP)
        scores = tile_product(
            a, b, row, col, n, m, units, a_row, a_unit, b_row, b_unit,
            ROWS, COLS, DEPTH, TMA, PRECISION, UPCAST,
        )  # fmt: skip
        if TMA:
            parts = quarters(scores)
            for part in tl.static_range(4):
                at = (col + part * (COLS // 4)).to(tl.int32)
                out.store([row.to(tl.int32), at], parts[part].to(out.dtype))
        else:
            r = tl.arange(0, ROWS)
            c = tl.arange(0, COLS)
            inside = (r < n - row)[:, None] & (c < stride - col)[None, :]
            start = out + row * stride + col
            tl.store(start + r[:, None] * stride + c[None, :], scores.to(out.dtype.element_ty), mask=inside)


def write_similarity(plan: Plan, out: Tensor) -> None:
    """Write the product of ``plan`` to ``out (n, m)``, which comes from :func:`padded_rows` (its padding as well)."""
    programs = min(plan.programs, plan.row_blocks * plan.col_blocks)
    launch(
        _similarity_kernel,
        (programs, 1, 1),
        (*plan.operands, output(plan, out), *plan.sizes, out.stride(0)),
        {"GROUP": GROUP, "FLATTEN": plan.flatten, **plan.constants, **launch_options(plan.config)},
    )


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b^T`` into ``out (n, m)``, which comes from :func:`padded_rows`; all on the current device, none empty."""
    plan = make_plan(a, b)
    if a.is_cuda and out.dtype == a.dtype == torch.float32 and plan.constants["PRECISION"] == "ieee":
        torch.mm(a, b.mT, out=out)  # without tensor cores, at which cuBLAS is several times as fast
    else:
        write_similarity(plan, out)


@op("similarity")
def similarity(image_units: Tensor, folded_text_units: Tensor) -> Tensor:
    """``image_units (N, U) @ folded_text_units (M, U)^T -> (N, M)``, accumulated in float32.

    Both float32, bfloat16 or float16, any strides, as is the result, whose rows lie a multiple of 64 elements apart.
    float32 is multiplied as float32, or as TF32 where ``torch.set_float32_matmul_precision`` allows it. Raises
    ValueError for other shapes or dtypes.
    """
    check_operands(image_units, folded_text_units)
    n, m = image_units.shape[0], folded_text_units.shape[0]
    out = padded_rows(n, m, image_units.dtype, image_units.device)
    if out.numel():
        with on_device_of(image_units):
            multiply(image_units, folded_text_units, out)
    return out


@similarity.register_fake
def _(image_units, folded_text_units):
    check_operands(image_units, folded_text_units)
    n, m = image_units.shape[0], folded_text_units.shape[0]
    return padded_rows(n, m, image_units.dtype, image_units.device)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    image_units, folded_text_units = ctx.saved_tensors
    grad = grad.to(image_units.dtype)
    units = image_units.shape[1]
    to_image, to_text = ctx.needs_input_grad
    if not torch.is_grad_enabled():  # else units are an inner dimension of the next backward
        image_units, folded_text_units = widened(image_units), widened(folded_text_units)
    grad_image = torch.mm(grad, folded_text_units)[:, :units] if to_image else None
    grad_text = torch.mm(grad.t(), image_units)[:, :units] if to_text else None
    return grad_image, grad_text


similarity.register_autograd(_backward, setup_context=_setup_context, twice=True)


def compile_cases() -> list[CompileCase]:
    n, m, units = 5_000, 25_000, 1_022  # COCO 5K
    return tile_cases(
        "similarity_5k",
        _similarity_kernel,
        {"out": "OUT", "out_row": "i32"},
        [("", {"GROUP": GROUP})],
        lambda itemsize: (2.0 * n * m * units, itemsize * ((n + m) * units + n * m)),
        divisible=("out",),
    )
