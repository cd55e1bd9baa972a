"""Kernel tests run on a GPU, or interpreted in a process of their own (`TRITON_INTERPRET=1 pytest tests/kernels`)."""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = torch.cuda.is_available() or INTERPRETING


def pytest_ignore_collect(collection_path, config):
    if not RUNNABLE and collection_path.suffix == ".py" and collection_path.name != "conftest.py":
        return True
    return None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture
def poison(monkeypatch):
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that an unwritten element shows."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**30))

        return fill

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def descriptors_at_any_size(monkeypatch):
    """Small problems go through descriptors too, where a GPU has them; others lie so that none can be made."""
    if RUNNABLE:
        from esl_fast.kernels import contribution, plan

        monkeypatch.setattr(plan, "TMA_FROM", 0)
        monkeypatch.setattr(contribution, "DESCRIPTORS_FROM", 0)
