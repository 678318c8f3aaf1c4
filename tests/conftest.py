"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test, whether it runs alone, in another order, or again."""
    torch.manual_seed(0)
