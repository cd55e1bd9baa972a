import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers fill the cores; threads on top of them would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
