"""Compile every kernel without a GPU and say what became of it.

    python -m esl_fast.kernels.inspect [--target sm_90] [--module similarity]

A kernel module lists what its launchers run as ``compile_cases() -> list[CompileCase]``. Registers, stack and shared
memory come from `cuobjdump` in Triton's wheel for NVIDIA (spills show as STACK) and from the assembly's metadata for
AMD. Run it in a process without `TRITON_INTERPRET`: interpreted kernels cannot be compiled.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import ASTSource

from esl_fast.kernels._case import TARGETS, CompileCase
from esl_fast.kernels._common import OPTIONS

MODULES = (
    "aggregate", "composed", "select", "contribution", "similarity", "paired", "contrastive", "ranks", "topk",
    "region_word",
)  # fmt: skip

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # of NVIDIA, in Triton's wheel


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case; ``error`` is set, and the numbers are 0, where it did not compile.

    ``mma`` counts matrix instructions of the target's kind (``wgmma`` apart), ``tma`` bulk tensor copies,
    ``wide_loads`` 128-bit loads from global memory.
    """

    module: str
    name: str
    target: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    wgmma: int = 0
    mma: int = 0
    tma: int = 0
    wide_loads: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    roofline_us: float = 0.0
    error: str = ""


def cases(modules: Iterable[str] = MODULES) -> Iterator[tuple[str, CompileCase]]:
    """``(module, case)`` of every module."""
    for module in modules:
        for case in importlib.import_module(f"esl_fast.kernels.{module}").compile_cases():
            yield module, case


def compile_case(case: CompileCase, target: str):
    """The compiled kernel of ``case`` for a key of :data:`TARGETS`, with Triton's cache."""
    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs) | set(case.divisible)) - set(names)
    missing = set(names) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(f"{case.name}: unknown arguments {sorted(unknown)}, missing arguments {sorted(missing)}")
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=divisible)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **OPTIONS}
    return triton.compile(source, target=TARGETS[target], options=options)


def inspect_case(module: str, case: CompileCase, target: str) -> Report:
    """Compile ``case`` for ``target`` and count."""
    paper = {"flops": case.flops, "bytes": case.bytes, "roofline_us": case.roofline_us}
    try:
        compiled = compile_case(case, target)
        measured = _amd(compiled) if target.startswith("gfx") else _nvidia(compiled)
    except Exception as error:  # whatever the compiler raises is the finding
        return Report(module, case.name, target, error=f"{type(error).__name__}: {error}", **paper)
    return Report(module, case.name, target, shared=compiled.metadata.shared, **measured, **paper)


def _nvidia(compiled) -> dict[str, int]:
    ptx = compiled.asm["ptx"]
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ag]\S* .*, 0x10", ptx)),
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", out.stdout)}
    if "REG" not in usage:
        raise RuntimeError(f"cuobjdump printed no resource usage: {out.stdout} {out.stderr}")
    return usage


def _amd(compiled) -> dict[str, int]:
    asm = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", asm)
        return int(found.group(1)) if found else 0

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "mma": len(re.findall(r"v_mfma", asm)),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
    }


def reports(targets: Iterable[str] = tuple(TARGETS), modules: Iterable[str] = MODULES) -> Iterator[Report]:
    """Reports of every case on every target on which its launcher would pick it."""
    for module, case in cases(modules):
        for target in targets:
            if target in case.targets:
                yield inspect_case(module, case, target)


def table(rows: Iterable[Report]) -> str:
    """A text table of ``rows``, one line a report."""
    header = ("kernel", "target", "regs", "stack", "shared", "wgmma", "mma", "tma", "ld128", "GFLOP", "MB", "H200 us")
    lines = [header]
    for row in rows:
        start = (f"{row.module}.{row.name}", row.target)
        end = (f"{row.flops / 1e9:.3g}", f"{row.bytes / 1e6:.3g}", f"{row.roofline_us:.1f}")
        counts = (row.registers, row.stack, row.shared, row.wgmma, row.mma, row.tma, row.wide_loads)
        if row.error:
            lines.append((*start, *[""] * len(counts), *end, row.error.strip().splitlines()[0]))
        else:
            lines.append((*start, *map(str, counts), *end))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(header) - 2)]
    return "\n".join(
        "  ".join([*(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=False)), *line[len(header) :]])
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esl_fast.kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="default: all; may be repeated")
    parser.add_argument("--module", action="append", choices=MODULES, help="default: all; may be repeated")
    args = parser.parse_args(argv)
    rows = list(reports(args.target or tuple(TARGETS), args.module or MODULES))
    print(table(rows))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
