"""How all-pairs kernels run: tile shapes by target, ways of loading, and the shape of the work."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esl_fast.kernels._case import TARGETS, CompileCase
from esl_fast.kernels._common import INTERPRETING, cdiv, exact_float32, padded_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TMA_FROM = 1 << 18  # scores; making descriptors takes the host longer than they save a small batch
GROUP = 8  # row blocks that share their columns while these are in L2


@dataclass(frozen=True)
class TileConfig:
    """Tile of ``rows x cols``, ``depth`` units a step."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


# By target and by what is multiplied (16 bits, TF32 or float32), through descriptors and through pointers. 128 x 256
# needs 8 warps (4 would spill), fills an SM, and leaves no registers for addresses. "sm_80" serves every NVIDIA GPU
# without wgmma or tcgen05 and must fit the 99 KB of the small ones.
TMA_CONFIGS = {
    "sm_90": {
        "half": TileConfig(128, 256, 64, 8, 4),
        "tf32": TileConfig(128, 128, 32, 8, 4),
        "fp32": TileConfig(128, 128, 32, 8, 3),
    },
    "sm_100": {"half": TileConfig(128, 256, 64, 8, 3), "tf32": TileConfig(128, 128, 32, 8, 3)},
}
# The same for kernels with more to do than to store a tile: half as many columns are half as many values to keep.
SWEEP_CONFIGS = {
    "sm_90": {
        "half": TileConfig(256, 128, 64, 8, 4),
        "tf32": TileConfig(256, 128, 32, 8, 3),
        "fp32": TileConfig(128, 128, 32, 8, 3),
    },
    "sm_100": {"half": TileConfig(128, 128, 64, 8, 3), "tf32": TileConfig(128, 128, 32, 8, 3)},
}
POINTER_CONFIGS = {
    "sm_80": {"half": TileConfig(128, 128, 32, 8, 4), "tf32": TileConfig(128, 128, 32, 8, 3)},
    "sm_90": {
        "half": TileConfig(128, 128, 32, 8, 4),
        "tf32": TileConfig(128, 128, 32, 8, 3),
        "fp32": TileConfig(128, 64, 32, 8, 3),
    },
    "sm_100": {"half": TileConfig(128, 128, 64, 8, 3), "tf32": TileConfig(128, 128, 32, 8, 3)},
    "gfx942": {"half": TileConfig(128, 128, 32, 8, 2), "tf32": TileConfig(128, 128, 32, 8, 2)},
}
# float32 where no configuration above has it: without tensor cores.
FP32 = TileConfig(64, 64, 16, 4, 2)
FP32_SWEEP = TileConfig(64, 64, 16, 8, 2)
UNSIGNED_NAN = {"sm_80": 8, "sm_90": 9}  # where a difference that is not a number has no sign
INTERPRETED = TileConfig(32, 64, 32, 4, 1)


@dataclass(frozen=True)
class Plan:
    """How one all-pairs product runs: operands as they lie in memory and as the kernels take them, and the shape of the
    work."""

    config: TileConfig
    tensors: tuple[Tensor, Tensor]
    operands: tuple[Any, Any]
    n: int
    m: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    programs: int

    @property
    def flatten(self) -> bool:
        """Whether persistent kernels load the next tile's first units during the epilogue of the last (TMA only)."""
        return self.constants["TMA"] and not INTERPRETING

    @property
    def warps(self) -> int:
        """WARPS of :func:`sum_own_rows`."""
        return warps_along_rows(self.config)

    @property
    def row_blocks(self) -> int:
        return cdiv(self.n, self.config.rows)

    @property
    def col_blocks(self) -> int:
        return cdiv(self.m, self.config.cols)


def sweeps(plan: Plan) -> tuple[int, int]:
    """Row and column groups for kernels that walk down columns, one program a pair of groups.

    The split that leaves the fullest program the fewest tiles; of equal ones that with the fewest row groups: a part
    of the columns' result is kept for each, and splits nearer to a square were slower (32,768 x 32,768 on an H200).
    """
    rows, cols, programs = plan.row_blocks, plan.col_blocks, plan.programs

    def cost(col_groups: int) -> tuple[int, int]:
        row_groups = max(1, min(rows, programs // col_groups))
        return cdiv(rows, row_groups) * cdiv(cols, col_groups), row_groups

    col_groups = min(range(1, min(cols, programs) + 1), key=cost)
    return cost(col_groups)[1], col_groups


def make_plan(a: Tensor, b: Tensor, *, sweep: bool = False, tma: bool | None = None) -> Plan:
    """Plan of ``a (n, units) @ b (m, units)^T`` for non-empty operands of one dtype on one device.

    ``sweep``: for a kernel that does more than store its tiles.
    ``tma`` overrides the choice between TMA descriptors and pointers. What TMA cannot read of a large product is
    copied.
    Raises ValueError for other shapes or dtypes.
    """
    check_operands(a, b)
    precision = dot_precision(a.dtype)
    target = target_of(a.device)
    if tma is None:
        large = a.shape[0] * b.shape[0] >= TMA_FROM
        tma = large and a.shape[1] > 0 and _kind(precision) in TMA_CONFIGS.get(target, ())
        if tma:
            a, b = _aligned(a), _aligned(b)
    config = tile_config(target, precision, tma, sweep)
    return Plan(
        config=config,
        tensors=(a, b),
        operands=(
            descriptor(a, config.rows, config.depth) if tma else a,
            descriptor(b, config.cols, config.depth) if tma else b,
        ),
        n=a.shape[0],
        m=b.shape[0],
        sizes=(a.shape[0], b.shape[0], a.shape[1], *a.stride(), *b.stride()),
        constants=tile_constants(
            config, precision, target, tma=tma, upcast=INTERPRETING and a.dtype == torch.bfloat16
        ),
        programs=processors(a.device),
    )


def check_operands(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless ``a (n, units)`` and ``b (m, units)`` agree in width, dtype and device."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected (n, units) and (m, units), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in DTYPES:
        raise ValueError(f"expected two float32, bfloat16 or float16 tensors, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"expected both on one device, got {a.device} and {b.device}")


def tile_config(target: str, precision: str, tma: bool, sweep: bool = False) -> TileConfig:
    """The configuration for a target, :func:`dot_precision`, way of loading and kind of kernel."""
    if target == "interpreted":
        return INTERPRETED
    configs = (SWEEP_CONFIGS if sweep else TMA_CONFIGS) if tma else POINTER_CONFIGS
    return configs[target].get(_kind(precision)) or (FP32_SWEEP if sweep else FP32)


def tile_constants(
    config: TileConfig, precision: str, target: str, *, tma: bool, upcast: bool = False
) -> dict[str, Any]:
    """The constexpr arguments of :func:`tile_product`."""
    return {
        "ROWS": config.rows,
        "COLS": config.cols,
        "DEPTH": config.depth,
        "TMA": tma,
        "PRECISION": exact_dot(target) if precision == "fp32" else "tf32",
        "UPCAST": upcast,
    }


def exact_dot(target: str) -> str:
    """How float32 is multiplied as float32.

    Three products of TF32 parts are as accurate (relative error on an H200 at K = 1,022: 1.7e-7, by cuBLAS 5.7e-7) and
    many times faster than what Triton makes without tensor cores. They were measured on sm_90 alone.
    """
    return "tf32x3" if target == "sm_90" else "ieee"


def _kind(precision: str) -> str:
    """Key of a target's configurations."""
    return "half" if precision in ("bf16", "fp16") else precision


def warps_along_rows(config: TileConfig) -> int:
    return min(config.num_warps, config.rows // 16)


def launch_options(config: TileConfig) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def dot_precision(dtype: torch.dtype) -> str:
    """What multiplies: ``"bf16"``, ``"fp16"``, or for float32 ``"fp32"`` unless PyTorch was allowed ``"tf32"``."""
    if dtype == torch.float32:
        return "fp32" if exact_float32() else "tf32"
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def tma_ready(x: Tensor) -> bool:
    """Whether a TMA descriptor can read ``x``: units contiguous, base and row stride multiples of 16 bytes."""
    row, unit = x.stride()
    return unit == 1 and row > 0 and row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 and x.shape[1] > 0


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy that TMA can read: a few bytes an element, where units out of line would cost times the work."""
    return x if tma_ready(x) else padded_rows(*x.shape, x.dtype, x.device).copy_(x)


def output(plan: Plan, out: Tensor) -> Any:
    """``out``, in aligned rows, as kernels take it that write a quarter of a tile at a time."""
    return descriptor(out, plan.config.rows, plan.config.cols // 4) if plan.constants["TMA"] else out


def descriptor(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, depth])


def target_of(device: torch.device) -> str:
    """Key of :data:`POINTER_CONFIGS` for a device, ``"interpreted"`` off the GPU."""
    return _target_of_gpu(_index(device)) if device.type == "cuda" else "interpreted"


def unsigned_nan(device: torch.device) -> bool:
    """Whether a difference that is not a number has no sign there; later GPUs that run as ``"sm_80"`` may differ."""
    return device.type == "cuda" and _unsigned_nan_of_gpu(_index(device))


def processors(device: torch.device) -> int:
    """Blocks that run at once where each fills a multiprocessor."""
    return _processors_of_gpu(_index(device)) if device.type == "cuda" else 3


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _target_of_gpu(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(index)[0], "sm_80")


@functools.cache
def _unsigned_nan_of_gpu(index: int) -> bool:
    return UNSIGNED_NAN.get(_target_of_gpu(index)) == torch.cuda.get_device_capability(index)[0]


@functools.cache
def _processors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def tile_cases(
    name: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: Sequence[tuple[str, dict[str, Any]]],
    work: Callable[[int], tuple[float, float]],
    divisible: tuple[str, ...] = (),
    sweep: bool = False,
) -> list[CompileCase]:
    """Cases of an all-pairs kernel, one for every configuration in use.

    ``arguments`` holds the types of what the kernel takes beside the operands of :func:`tile_product` (``"OUT"``: what
    it writes a quarter of a tile at a time, see :func:`output`), ``constants``
    the kernel's own constexprs by variant name (in 16 bits; the first one in float32 as well), ``work(itemsize)`` its
    FLOPs and bytes.
    """
    sizes = {"n": "i32", "m": "i32", "units": "i32", "a_row": "i32", "b_row": "i32"}
    found = []
    for target in TARGETS:
        for precision, dtype in (("bf16", "bf16"), ("tf32", "fp32"), ("fp32", "fp32")):
            for tma in [True, False] if _kind(precision) in TMA_CONFIGS.get(target, ()) else [False]:
                config = tile_config(target, precision, tma, sweep)
                operands = {"a": f"*{dtype}", "b": f"*{dtype}"}
                if tma:
                    operands = {
                        "a": f"tensordesc<{dtype}[{config.rows}, {config.depth}]>",
                        "b": f"tensordesc<{dtype}[{config.cols}, {config.depth}]>",
                    }
                flops, moved = work(2 if dtype == "bf16" else 4)
                out = f"tensordesc<{dtype}[{config.rows}, {config.cols // 4}]>" if tma else f"*{dtype}"
                others = {name: out if kind == "OUT" else kind for name, kind in arguments.items()}
                found += [
                    CompileCase(
                        name="_".join(filter(None, (name, variant, precision, "tma" if tma else "pointer"))),
                        kernel=kernel,
                        signature={**operands, **sizes, **others},
                        constexprs={
                            "a_unit": 1,
                            "b_unit": 1,
                            **tile_constants(config, precision, target, tma=tma),
                            **({"FLATTEN": tma} if "FLATTEN" in kernel.arg_names else {}),
                            **({"SIGNS": target in UNSIGNED_NAN} if "SIGNS" in kernel.arg_names else {}),
                            **({"WARPS": warps_along_rows(config)} if "WARPS" in kernel.arg_names else {}),
                            **extra,
                        },
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                        divisible=tuple(
                            name
                            for name in ("a", "b", "a_row", "b_row", *divisible)
                            if not (operands | others).get(name, "").startswith("tensordesc")
                        ),
                        wants_wgmma=target == "sm_90",
                        flops=flops,
                        bytes=moved,
                        precision="tf32x3" if precision == "fp32" and target == "sm_90" else precision,
                        targets=(target,),
                    )
                    for variant, extra in (constants if precision == "bf16" else constants[:1])
                ]
    return found
