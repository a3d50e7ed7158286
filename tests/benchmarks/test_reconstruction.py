"""``Reconstruction``: the check of its rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reconstruction import Reconstruction


def test_a_reconstruction_is_fp32():
    with pytest.raises(ValueError, match=r"rows: expected \(V, H\) float32, got \(3, 2\) torch.float64"):
        Reconstruction(torch.zeros(3, 2).double(), {})
