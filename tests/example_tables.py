"""A packed table of any weights, made without a method: rows of 8, 4 and 2 bits and of a basis in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.methods import METHODS, Method
from embkern.methods.base import Options
from embkern.ops.packed_codes import GROUP, LEVEL_BITS, packed_levels
from embkern.ops.packed_format import Tier
from embkern.ops.quantize_trellis import quantize_trellis
from embkern.tables.packed import PackedTable, pack


def quantized(values: Tensor, tier: Tier) -> tuple[Tensor, Tensor]:
    """Codes of values (N, 32 G) at a tier of one number of bits, and scales (N,)."""
    bits = tier.bits[0]
    if bits > LEVEL_BITS:
        middle = (2**bits - 1) / 2
        scales = values.abs().amax(1).clamp_min(1e-30) / middle
        return (values / scales.unsqueeze(1) + middle).round().to(torch.uint8), scales
    tried = values.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30).float()
    each = torch.full((len(tier.bits),), bits, dtype=torch.uint8)
    codes, scales, _ = quantize_trellis(values.float(), None, each, packed_levels(), tried, needs_codes=True)
    return codes, scales.double()


def packed_of(weight: Tensor, dtype: torch.dtype | None = None, offset: bool = True) -> PackedTable:
    """Rows in turn at 8, 4 and 2 bits, and 4 bits in a basis; floats in ``dtype``, or as stored."""
    dtype = dtype or (torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float16)
    V, H = weight.shape
    groups = -(-H // GROUP)
    tiers = [*(Tier(False, (bits,) * groups) for bits in (8, 4, 2)), Tier(True, (4,))]
    mean = weight.double().mean(0) if offset else torch.zeros(H).double()
    basis = torch.linalg.qr(torch.randn(max(H, GROUP), GROUP, generator=torch.Generator().manual_seed(1)))[0]
    basis = basis.t()[:, :H].double()
    tier_of, scales, codes = torch.arange(V) % len(tiers), torch.zeros(V).double(), {}
    for index, tier in enumerate(tiers):
        ids = torch.nonzero(tier_of == index).flatten()
        rows = weight[ids].double() - mean
        values = rows @ torch.linalg.pinv(basis) if tier.transform else rows
        values = F.pad(values, (0, max(0, GROUP * len(tier.bits) - values.shape[1])))
        codes[index], scales[ids] = quantized(values, tier)
    floats = [scales.to(dtype), basis.to(dtype), mean.to(dtype) if offset else None]
    return pack(tier_of, codes, tiers, packed_levels().clone(), *floats, H)


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
