"""Every kernel compiles for every target within its budget of stack and shared memory. No GPU needed."""

import dataclasses
import os

import pytest

pytest.importorskip("triton")

import triton

from esl_fast.kernels import inspect

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

# Most shared memory one block may ask for, in bytes; "sm_80" also runs on GPUs that have no more than this.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Bytes of stack a thread where registers do not suffice; everything else has none.
SPILLS = {
    ("aggregate.adaptive_backward_1152_normalized_fp32", "sm_80"): 40,
    ("contrastive.contrastive_online_32k_diagonal_fp32_pointer", "sm_80"): 16,
    ("paired.paired_25k_owned_fp32", "sm_80"): 8,
    ("contrastive.contrastive_online_32k_positive_bf16_tma", "sm_100"): 32,
    ("contrastive.contrastive_online_32k_ignore_bf16_pointer", "sm_100"): 88,
    ("contribution.fold_bf16_tma_sm_90", "sm_100"): 16,
    ("similarity.similarity_5k_tf32_pointer", "sm_100"): 24,
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # as 3.6 compiles
    SPILLS |= {
        ("aggregate.adaptive_backward_1152_normalized_fp32", "sm_80"): 80,
        ("aggregate.adaptive_backward_1152_normalized_fp32", "sm_90"): 96,
        ("contrastive.contrastive_online_32k_diagonal_tf32_pointer", "sm_80"): 8,
        ("contrastive.contrastive_online_32k_positive_bf16_tma", "sm_100"): 56,
        ("contrastive.contrastive_sums_32k_positive_bf16_tma", "sm_90"): 8,
        ("contribution.fold_bf16_tma_sm_90", "sm_100"): 40,
    }


def chosen():
    """All that runs on the GPUs that are common; of the others, of each kernel one variant a precision and way of
    loading. `python -m esl_fast.kernels.inspect` compiles everything."""
    seen = set()
    for module, case in inspect.cases():
        for target in case.targets:
            descriptors = any(kind.startswith("tensordesc") for kind in case.signature.values())
            kind = (case.kernel, case.precision, descriptors, target)
            known = (f"{module}.{case.name}", target) in SPILLS
            if target in ("sm_80", "sm_90") or kind not in seen or known:
                yield pytest.param(module, case, target, id=f"{module}.{case.name}-{target}")
            seen.add(kind)


@pytest.mark.parametrize(("module", "case", "target"), list(chosen()))
def test_budget(module, case, target):
    report = inspect.inspect_case(module, case, target)
    assert not report.error, report.error
    assert report.shared <= SHARED_MEMORY[target]
    assert report.stack <= SPILLS.get((f"{module}.{case.name}", target), 0), "spilled registers"
    if target == "sm_90":
        assert (report.wgmma > 0) >= case.wants_wgmma
    if target in ("sm_90", "sm_100") and any(kind.startswith("tensordesc") for kind in case.signature.values()):
        assert report.tma > 0


def test_launch_arguments_are_checked():
    module, case = next(inspect.cases())
    broken = dataclasses.replace(case, signature={**case.signature, "no_such_argument": "i64"})
    assert "no_such_argument" in inspect.inspect_case(module, broken, "sm_90").error
