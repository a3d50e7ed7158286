"""A packed table of any weights, made without a method: rows of 8, 4 and 2 bits and of a basis in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.methods import METHODS, Method
from embkern.methods.base import Options
from embkern.ops.packed_format import GROUP, LEVEL_BITS, LEVEL_STEP, STATES, Tier
from embkern.tables.packed import PackedTable, pack


def uniform_levels() -> Tensor:
    """Levels (4, 128) that go by a value's own code alone, evenly from about -2 to 2."""
    rows = []
    for bits in range(1, LEVEL_BITS + 1):
        own = (torch.arange(STATES) % 2**bits - (2**bits - 1) / 2) / 2 ** (bits - 1) * 2
        rows.append((own / LEVEL_STEP).to(torch.int16))
    return torch.stack(rows)


def values_of(levels: Tensor, bits: int) -> Tensor:
    """Values (2**bits,) float64 of codes of so many bits, at levels that go by the code alone."""
    if bits > LEVEL_BITS:
        return torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return levels[bits - 1, : 2**bits].double() * LEVEL_STEP


def packed_of(weight: Tensor, dtype: torch.dtype | None = None, offset: bool = True) -> PackedTable:
    """Rows in turn at 8, 4 and 2 bits, and 4 bits in a basis; floats in ``dtype``, or as stored."""
    dtype = dtype or (torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16)
    V, H = weight.shape
    groups = -(-H // GROUP)
    tiers = [*(Tier(False, (bits,) * groups) for bits in (8, 4, 2)), Tier(True, (4,))]
    levels = uniform_levels()
    mean = weight.double().mean(0) if offset else torch.zeros(H).double()
    basis = torch.linalg.qr(torch.randn(max(H, GROUP), GROUP, generator=torch.Generator().manual_seed(1)))[0]
    basis = basis.t()[:, :H].double()
    tier_of, scales, codes = torch.arange(V) % len(tiers), torch.zeros(V).double(), {}
    for index, tier in enumerate(tiers):
        ids = torch.nonzero(tier_of == index).flatten()
        rows = weight[ids].double() - mean
        values = rows @ torch.linalg.pinv(basis) if tier.transform else rows
        values = F.pad(values, (0, max(0, GROUP * len(tier.bits) - values.shape[1])))
        of_bits = values_of(levels, tier.bits[0])
        largest = values.abs().amax(1).clamp_min(1e-30)
        scales[ids] = largest / of_bits.max()
        codes[index] = (values / scales[ids, None])[:, :, None].sub(of_bits).abs().argmin(2).to(torch.uint8)
    floats = [scales.to(dtype), basis.to(dtype), mean.to(dtype) if offset else None]
    return pack(tier_of, codes, tiers, levels, *floats, H)


class QuantizeOptions(Options):
    offset: bool = True


def quantize(table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any) -> PackedTable:
    """Stand in for a method that is sized by bytes and weighted by counts; it heeds neither."""
    assert counts is None or counts.shape == table.shape[:1]
    return packed_of(table, **options)


@pytest.fixture
def quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let recipes name the method above."""
    method = Method(quantize, QuantizeOptions, sized_by="ratio", weighted=True)
    monkeypatch.setitem(METHODS, "quantize", method)
