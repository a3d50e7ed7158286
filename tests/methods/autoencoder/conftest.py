"""A table for the tests of the autoencoder."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def table() -> torch.Tensor:
    """A table (120, 10) of rank 6."""
    return torch.randn(120, 6) @ torch.randn(6, 10)
