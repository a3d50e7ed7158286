"""Lookups in factorised tables of random numbers, and the same in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from embkern.ops.backends import unavailable


def problem(shape, dtype=torch.float32, device="cpu", offset=True, ids_dtype=torch.int64):
    V, r, H, N = shape
    ids = (torch.rand(N, device=device) ** 3 * V).to(
        ids_dtype
    )  # The draw is skewed, so that many ids repeat.
    codes = torch.randn(V, r, device=device).to(dtype)
    basis = (torch.randn(r, H, device=device) / r**0.5).to(dtype)
    return ids, codes, basis, torch.randn(H, device=device).to(dtype) if offset else None


def plain(ids, codes, basis, offset):
    rows = F.embedding(ids, codes) @ basis
    return rows if offset is None else rows + offset


def skip_without_float64(backend, device):
    if reason := unavailable(backend, "gather_project", device, torch.float64):
        pytest.skip(reason)
