"""Kernels found again: never one that was compiled for other arguments."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import BaseBackend

from esl_fast.kernels import _launch
from esl_fast.kernels._common import OPTIONS

MEMORY = torch.zeros(256)
ARGUMENTS = [
    0, 1, 2, 8, 15, 16, 17, 32, 33, 2**31 - 1, 2**31, 2**31 + 15, 2**40, 2**40 + 1,
    *(MEMORY.to(dtype)[start:] for dtype in (torch.float32, torch.bfloat16, torch.int32) for start in (0, 1, 2, 4, 8)),
    torch.nn.Parameter(MEMORY[4:]), torch.nn.Parameter(MEMORY[1:]), None,
]  # fmt: skip


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("alignment", [True, False])
def test_what_triton_tells_apart_is_told_apart(value, alignment):
    jit = pytest.importorskip("triton._C.libtriton")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton specializes elsewhere")
    triton = [jit.native_specialize_impl(BaseBackend, x, False, value, alignment) for x in ARGUMENTS]
    ours = [_launch.specialization((x,), [(value, alignment)]) for x in ARGUMENTS]
    for i, j in product(range(len(ARGUMENTS)), repeat=2):
        if ours[i] == ours[j]:
            assert triton[i] == triton[j], (ARGUMENTS[i], ARGUMENTS[j])
    if not value:  # what varies from batch to batch is found again
        assert len(set(map(tuple, ours))) <= len(set(map(tuple, triton))) + 4


@pytest.mark.parametrize("argument", [True, 1.0, "x", MEMORY.numpy()])
def test_other_arguments_are_left_to_triton(argument):
    assert _launch.specialization((1, argument), [(True, True)] * 2) is None


def test_a_kernel_is_found_again(monkeypatch):
    device = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(_launch, "REMEMBERING", True)
    monkeypatch.setattr(_launch, "_compiled", {})
    calls = []

    class Recorder:
        arg_names = ("x", "n", "WIDTH", "BLOCK")
        params = (SimpleNamespace(do_not_specialize=False, do_not_specialize_on_alignment=False),) * 4

        def __init__(self, name, returns):
            self.name, self.returns = name, returns

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((self.name, grid, args, options)) or self.returns

    kernel = Recorder("kernel", Recorder("compiled", None))
    constants = {"BLOCK": 64, "WIDTH": (4, 2), "num_warps": 4}

    def launch(*arguments, **changed):
        calls.clear()
        _launch.launch(kernel, (3, 1, 1), arguments, constants | changed)
        return calls[0]

    assert launch(MEMORY, 32) == ("kernel", (3, 1, 1), (MEMORY, 32), constants | OPTIONS)
    assert launch(MEMORY[4:], 48)[0] == "compiled"
    name, grid, arguments, options = launch(MEMORY, 32)
    assert (name, grid, arguments[1:], options) == ("compiled", (3, 1, 1), (32, (4, 2), 64), {})
    assert arguments[0] is MEMORY
    for other in ((MEMORY[1:], 32), (MEMORY, 33), (MEMORY, 1), (MEMORY, 2**35), (MEMORY.double(), 32)):
        assert launch(*other)[0] == "kernel"
    assert launch(MEMORY, 32, num_warps=8)[0] == "kernel"
    device.get_current_device = lambda: 1
    assert launch(MEMORY, 32)[0] == "kernel"
    kernel.returns = None  # a hook kept Triton from compiling
    for _ in range(2):
        assert launch(MEMORY, 33)[0] == "kernel"
