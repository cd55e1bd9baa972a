"""What is measured: every case is one problem at one size, solved by several competitors."""

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

MODULES = ("head", "ranks", "contrastive", "topk", "region_word")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Largest error of a result over its largest value, against float64.
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}
TINY = (37, 41)


@dataclass(frozen=True)
class Parity:
    """How far our result lies from the definition in float64, and how much of it was compared."""

    error: float
    tolerance: float
    compared: str

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Problem:
    """Inputs on the device, and who solves it.

    ``competitors`` maps ``"ours"``, ``"limit"`` (the bare matrix product) and baselines to functions of no argument;
    ``flops`` counts the matrix products that a solution cannot avoid.
    """

    competitors: Mapping[str, Callable[[], object]]
    parity: Callable[[], Parity]
    flops: float


@dataclass(frozen=True)
class Case:
    """``build(device, dtype, n, m, **options)`` at one size.

    ``memory`` names the competitors whose peak memory is measured; ``quick`` cases are those that `--quick` keeps.
    """

    build: Callable[..., Problem]
    n: int
    m: int
    dtype: str = "float32"
    options: Mapping[str, str | int] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    timed: bool = True
    quick: bool = False

    @property
    def family(self) -> str:
        return self.build.__name__

    @property
    def name(self) -> str:
        return "/".join([self.family, *map(str, self.options.values()), f"{self.n}x{self.m}", self.dtype])

    def problem(self, device: torch.device) -> Problem:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if self.dtype == "tf32" else "highest")
        return self.build(device, self.dtype, self.n, self.m, **self.options)

    def tiny(self) -> "Case":
        """The same at a size that shows only whether the result is right."""
        n, m = TINY
        return replace(self, n=n, m=n if self.n == self.m else m, memory=(), timed=False)


def find(device: str, pattern: str = "*") -> list[Case]:
    """Cases whose name contains ``pattern`` (shell wildcards), quick ones first."""
    cases = []
    for module in MODULES:
        cases += importlib.import_module(f"benchmarks.cases.{module}").cases(device)
    chosen = [case for case in cases if fnmatch.fnmatch(case.name, f"*{pattern}*")]
    return sorted(chosen, key=lambda case: not case.quick)
