"""Every kernel compiles for every target within its budget of registers, stack and shared memory. No GPU needed."""

import os

import pytest

pytest.importorskip("triton")

from esl_fast.kernels import inspect

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

CASES = [
    pytest.param(
        module,
        case,
        target,
        id=f"{module}.{case.name}-{target}",
        marks=[] if target == "sm_90" else [pytest.mark.slow],
    )
    for module, case in inspect.cases()
    for target in case.targets
]


@pytest.mark.parametrize(("module", "case", "target"), CASES)
def test_budget(module, case, target):
    report = inspect.inspect_case(module, case, target)
    assert not report.error, report.error
    assert report.shared <= inspect.SHARED_MEMORY[target]
    if target == "sm_90":
        assert report.stack == 0, "spilled registers"
        assert report.registers <= 255
        assert (report.wgmma > 0) >= case.wants_wgmma
    if target in ("sm_90", "sm_100") and any(kind.startswith("tensordesc") for kind in case.signature.values()):
        assert report.tma > 0


def test_launch_arguments_are_checked():
    module, case = next(inspect.cases())
    broken = inspect.dataclasses.replace(case, signature={**case.signature, "no_such_argument": "i64"})
    assert "no_such_argument" in inspect.inspect_case(module, broken, "sm_90").error
