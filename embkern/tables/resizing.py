"""Tables with more rows or fewer: old rows keep their bits, new ones decode to the mean row."""

from __future__ import annotations

import dataclasses
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.packed_format import (
    GROUP,
    LEVEL_BITS,
    LEVEL_STEP,
    Tier,
    bit_planes,
    directory_of,
    trellis_states,
    words_of_rows,
)
from ..ops.quantize_trellis import quantize_trellis
from .factors import Factors
from .packed import PackedTable

_SCALES = 64  # tried for a new row
_ROWS = 8192  # decoded at a time


@singledispatch
def resized(table: Any, num_embeddings: int) -> Any:
    """Return a table of ``num_embeddings`` rows; tensors that need no change are those of ``table``.

    New rows decode to the mean of all rows: of factors exactly, of a packed table as nearly as one of its
    tiers can. The codes of a packed table are frozen: training changes how long a new row is, and where it
    points only through ``basis`` and ``offset``.
    """
    raise TypeError(f"table: expected Factors or a PackedTable, got {type(table).__name__}")


@resized.register
def _(table: Factors, num_embeddings: int) -> Factors:
    codes = table.codes
    mean = codes.double().mean(0, keepdim=True).to(codes.dtype)
    added = max(0, num_embeddings - len(codes))
    return dataclasses.replace(table, codes=torch.cat([codes[:num_embeddings], mean.expand(added, -1)]))


@resized.register
def _(table: PackedTable, num_embeddings: int) -> PackedTable:
    tiers, scales = table.described_tiers(), table.scales[:num_embeddings]
    tier_of = table.tier_of_rows()[:num_embeddings].cpu()
    records = table.records[: int(words_of_rows(tier_of, tiers).sum())]
    if added := num_embeddings - len(scales):
        best, record, scale = _nearest_record(table, tiers, _mean_row(table))
        tier_of = torch.cat([tier_of, torch.full((added,), best)])
        records = torch.cat([records, record.to(records.device).repeat(added)])
        scales = torch.cat([scales, scales.new_full((added,), scale)])
    directory = directory_of(tier_of, tiers).to(scales.device)
    records = records if len(records) else table.records[:1]  # the format has a word at least
    return dataclasses.replace(table, records=records, directory=directory, scales=scales)


def _mean_row(table: PackedTable) -> Tensor:
    ids = torch.arange(table.num_embeddings, device=table.scales.device)
    total = torch.stack([table.decode(some).double().sum(0) for some in ids.split(_ROWS)]).sum(0)
    return (total / len(ids)).cpu()


def _nearest_record(table: PackedTable, tiers: list[Tier], row: Tensor) -> tuple[int, Tensor, float]:
    """Tier, record (W,) and scale that come nearest to a row (H,)."""
    if table.offset is not None:
        row = row - table.offset.cpu()
    best: tuple[int, Tensor, float] | None = None
    least = float("inf")
    for index, tier in enumerate(tiers):
        basis = None
        size = GROUP * len(tier.bits)
        values = F.pad(row, (0, max(0, size - len(row))))[:size]
        if tier.transform:
            assert table.basis is not None
            basis = table.basis[:size].cpu().double()
            values = torch.linalg.lstsq(basis.t(), row).solution
        codes, found = _quantized(table.levels.cpu(), tier, values)
        rows = F.pad(found, (0, max(0, len(row) - size)))[:, : len(row)] if basis is None else found @ basis
        along, square = rows @ row, rows.square().sum(1).clamp_min(1e-300)
        error, place = (row.square().sum() - along.square() / square).min(0)
        if best is None or float(error) < least:
            least, scale = float(error), float(along[place] / square[place])
            best = index, bit_planes(codes[place : place + 1], tier).flatten(), scale
    assert best is not None
    return best


def _quantized(levels: Tensor, tier: Tier, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and what they stand for, (S, 32 groups) at S scales, nearest to values (32 groups,)."""
    known = [_known_values(levels, bits) for bits in tier.bits]
    top = max([float(each.abs().max()) for each in known], default=0.0) or 1.0
    largest = max(values.abs().tolist(), default=0.0) or 1.0
    scales = largest / top * torch.logspace(-1, 0.5, _SCALES).double()
    codes, found = [torch.zeros(_SCALES, 0).long()], [torch.zeros(_SCALES, 0).double()]
    for part, bits, of_bits in zip(values.split(GROUP), tier.bits, known, strict=False):
        if 0 < bits <= LEVEL_BITS:
            rows, width = part.float().expand(_SCALES, -1), torch.tensor([bits], dtype=torch.uint8)
            tried = scales.float().unsqueeze(1)
            nearest = quantize_trellis(rows, None, width, levels, tried, needs_codes=True)[0].long()
            found.append(of_bits[trellis_states(nearest, bits)])
        else:
            nearest = (part / scales[:, None])[:, :, None].sub(of_bits).abs().argmin(2)
            found.append(of_bits[nearest])
        codes.append(nearest)
    return torch.cat(codes, 1), torch.cat(found, 1)


def _known_values(levels: Tensor, bits: int) -> Tensor:
    """What codes of so many bits can stand for, by the state of their trellis or by themselves."""
    if 0 < bits <= LEVEL_BITS:
        return levels[bits - 1].double() * LEVEL_STEP
    return torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
