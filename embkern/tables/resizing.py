"""Change the number of rows of a table: old rows keep their bits, new ones decode to the mean row."""

from __future__ import annotations

import dataclasses
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.first_edition import is_first_edition
from ..ops.packed_codes import GROUP, LEVEL_BITS, levels_of_windows, records_of, values_of_records
from ..ops.packed_format import Tier, directory_of, words_of_rows
from ..ops.quantize_trellis import quantize_trellis
from .factors import Factors
from .packed import PackedTable
from .rows import RowTable

_SCALES = 64  # scales that are tried for a new row
_ROWS = 8192  # rows that are decoded at a time


@singledispatch
def resized(table: Any, num_embeddings: int) -> Any:
    """Return a table of ``num_embeddings`` rows, which shares the tensors that do not change with ``table``.

    New rows decode to the mean of all rows: exactly in factors, and in a packed table to the nearest row that
    one of its tiers can represent. The codes of a packed table are frozen: training changes the length of a
    new row, and its direction only through ``basis`` and ``offset``. In other tables new rows are copies of
    the row whose direction is nearest to that of the mean.

    Raises:
        TypeError: ``table`` is no compressed table.
        ValueError: a packed table of the first edition, or a tensor train, is to get new rows.
    """
    raise TypeError(f"table: expected a compressed table, got {type(table).__name__}")


@resized.register
def _(table: Factors, num_embeddings: int) -> Factors:
    codes = table.codes
    mean = codes.double().mean(0, keepdim=True).to(codes.dtype)
    added = max(0, num_embeddings - len(codes))
    codes = torch.cat([codes[:num_embeddings], mean.expand(added, -1)])
    return dataclasses.replace(table, codes=codes, check=False)


@resized.register
def _(table: PackedTable, num_embeddings: int) -> PackedTable:
    tiers, scales = table.described_tiers(), table.scales[:num_embeddings]
    tier_of = table.tier_of_rows()[:num_embeddings].cpu()
    records = table.records[: int(words_of_rows(tier_of, tiers).sum())]
    if added := num_embeddings - len(scales):
        if is_first_edition(table.levels):
            raise ValueError(
                f"num_embeddings: expected at most {len(scales)}, got {num_embeddings}; a packed table of "
                "the first edition gets no new rows, compress the dense table again"
            )
        best, record, scale = _nearest_record(table, tiers, _mean_row(table))
        tier_of = torch.cat([tier_of, torch.full((added,), best)])
        records = torch.cat([records, record.to(records.device).repeat(added)])
        scales = torch.cat([scales, scales.new_full((added,), scale)])
    directory = directory_of(tier_of, tiers).to(scales.device)
    records = records if len(records) else table.records[:1]  # the format requires at least one word
    return dataclasses.replace(table, records=records, directory=directory, scales=scales, check=False)


@resized.register
def _(table: RowTable, num_embeddings: int) -> RowTable:
    V = table.num_embeddings
    ids = torch.arange(min(V, num_embeddings), device=table.device)
    if added := num_embeddings - V:
        nearest = _nearest_row(table) if added > 0 else 0
        ids = torch.cat([ids, ids.new_full((max(0, added),), nearest)])
    return table.take(ids)


def _nearest_row(table: RowTable) -> int:
    """Return the id of the row whose direction is nearest to that of the mean of all rows."""
    mean = torch.stack([table.row_range(*at).double().sum(0) for at in table.pieces()]).sum(0, keepdim=True)
    cosines = [F.cosine_similarity(table.row_range(*at).double(), mean, eps=1e-30) for at in table.pieces()]
    return int(torch.cat(cosines).argmax())


def _mean_row(table: PackedTable) -> Tensor:
    """Return the mean of all rows, (H,) float64 on the CPU."""
    ids = torch.arange(table.num_embeddings, device=table.scales.device)
    total = torch.stack([table.decode(some).double().sum(0) for some in ids.split(_ROWS)]).sum(0)
    return (total / len(ids)).cpu()


def _nearest_record(table: PackedTable, tiers: list[Tier], row: Tensor) -> tuple[int, Tensor, float]:
    """Return the tier, record (W,) and scale whose decoded row is nearest to a row (H,)."""
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
            best = index, records_of(codes[place : place + 1], tier.bits).flatten(), scale
    assert best is not None
    return best


def _quantized(levels: Tensor, tier: Tier, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and their values, both (S, 32 G), that are nearest to values (32 G,) at S scales."""
    bits = torch.tensor(tier.bits, dtype=torch.uint8)
    narrow = (bits <= LEVEL_BITS).repeat_interleave(GROUP)
    largest = max(values.abs().tolist(), default=0.0) or 1.0
    scales = largest / _largest_value(levels, tier) * torch.logspace(-1, 0.5, _SCALES).double()
    scaled = values / scales.unsqueeze(1)
    codes = torch.zeros(_SCALES, GROUP * len(tier.bits), dtype=torch.uint8)
    if narrow.any():
        rows, own = torch.where(narrow, scaled, 0.0).float(), torch.where(bits <= LEVEL_BITS, bits, 0)
        codes = quantize_trellis(rows, None, own, levels, torch.ones(_SCALES, 1), needs_codes=True)[0]
    most = 2.0 ** bits.repeat_interleave(GROUP) - 1
    uniform = (scaled + most / 2).round().clamp(min=0).minimum(most).to(torch.uint8)
    codes = torch.where(narrow, codes, uniform)
    records = records_of(codes, tier.bits)
    start, first = torch.arange(_SCALES) * tier.words, torch.zeros(_SCALES, dtype=torch.int64)
    padded = records.flatten() if tier.words else torch.zeros(1, dtype=torch.int32)
    return codes, values_of_records(padded, start, first, bits.long().unsqueeze(0), levels).double()


def _largest_value(levels: Tensor, tier: Tier) -> float:
    """Return the largest value that a code of the tier stands for, or 1 if that is 0."""
    of_levels = [float(each.abs().max()) for each in levels_of_windows(levels)]
    values = [of_levels[bits - 1] if bits <= LEVEL_BITS else (2**bits - 1) / 2 for bits in tier.bits if bits]
    return max(values, default=0.0) or 1.0
