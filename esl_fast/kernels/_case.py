"""What a kernel module says of its kernels to those who compile them without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
H200_BANDWIDTH = 4.8e12
H200_FLOPS = {"bf16": 790e12, "fp16": 790e12, "tf32": 400e12, "tf32x3": 133e12, "fp32": 60e12}


@dataclass(frozen=True)
class CompileCase:
    """One kernel as a launcher runs it.

    ``signature`` maps every argument to its Triton type (``"*bf16"``, ``"i64"``, ``"fp32"``,
    ``"tensordesc<bf16[128, 64]>"``); arguments in ``constexprs`` may be left out of it. ``divisible`` names the
    pointers and integers known to be multiples of 16. ``flops`` and ``bytes`` are those of one launch at the size
    that ``name`` tells, ``precision`` the unit that does the arithmetic, ``targets`` where the launcher would pick
    this configuration.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    wants_wgmma: bool = False
    flops: float = 0.0
    bytes: float = 0.0
    precision: str = "bf16"
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def roofline_us(self) -> float:
        """Microseconds that an H200 needs at least."""
        return 1e6 * max(self.flops / H200_FLOPS[self.precision], self.bytes / H200_BANDWIDTH)
