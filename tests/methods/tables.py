"""Tables for the tests of methods."""

from __future__ import annotations

import torch


def anisotropic(V, H, dtype=torch.float32):
    """Return rows with a decaying spectrum and different norms, like embeddings."""
    rows = torch.randn(V, H, dtype=torch.float64) * torch.logspace(0, -1, H, dtype=torch.float64)
    return (rows * torch.rand(V, 1, dtype=torch.float64).add(0.2)).to(dtype)
