import os

import pytest
import torch

# Sizes are small: threads would mostly wait for each other, on busy cores for most of the time.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
