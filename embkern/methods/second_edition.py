"""Packed tables of the first edition of the format, encoded again in the codes of the second one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.first_edition import is_first_edition
from ..ops.gather_decode import decode_rows
from ..ops.packed_codes import GROUP, LEVEL_BITS, packed_levels
from ..ops.packed_format import PackedTensors, Tier, lay_out
from ..ops.quantize_trellis import quantize_trellis
from ..tables.packed import PackedTable
from .base import BLOCK_ROWS
from .row_codes import RowCodes


class AddedError(NamedTuple):
    """What the second edition's rows y lost of the first edition's rows x, means over all rows.

    Attributes:
        direction: ``1 - F.cosine_similarity(x, y)``; 0 of a row of zeros that stays one.
        mse: ``(x - y).square()``, over all entries.
        share: the squared error over the squared norms, both summed over all rows.
    """

    direction: float
    mse: float
    share: float


@torch.no_grad()
def second_edition(table: PackedTable) -> PackedTable:
    """Encode the rows of a table of ``embkern.packed/1`` in the codes of ``embkern.packed/2``.

    Every row keeps its tier, and with it its bytes; basis and offset stay as they are. What the old codes of
    1 to 4 bits decode to is quantised by ``quantize_trellis``, and the row's scale is multiplied by the
    factor that fits the new codes best. Its errors add to those of the first edition: a table that is made of
    the dense rows is better. Rows of more than 4 bits keep their records and scales, and their bits.

    In a tier of both, which no method makes, the scales are kept, too. Coefficients are weighted by the norms
    of the rows of the basis.

    Raises:
        ValueError: the table is of the second edition.
    """
    if not is_first_edition(table.levels):
        raise ValueError("table: expected one of embkern.packed/1, got one of the second edition already")
    table = table.to("cpu")
    tiers, tier_of = table.described_tiers(), table.tier_of_rows()
    scales = table.scales.clone()

    def parts() -> Iterator[tuple[int, Tensor, Tensor]]:
        for index, tier in enumerate(tiers):
            ids = torch.nonzero(tier_of == index).flatten()
            for some in ids.split(BLOCK_ROWS) if tier.words else ():
                codes, factors = _encoded(tier, _values(table, tier, some), _spread(table, tier))
                scales[some] = (table.scales[some].double() * factors.double()).to(table.dtype)
                yield index, some, codes

    records = lay_out(tier_of, parts(), tiers)[0]
    return dataclasses.replace(
        table, records=records, levels=packed_levels().clone(), scales=scales, facts={}
    )


def added_error(before: PackedTable, after: PackedTable) -> AddedError:
    """Return what the rows of ``after`` lost of those of ``before``, decoded in fp32, in float64."""
    before, after = (each.to("cpu", torch.float32) for each in (before, after))
    direction, squares, norms = 0.0, 0.0, 0.0
    for ids in torch.arange(before.num_embeddings).split(BLOCK_ROWS):
        x, y = before.decode(ids).double(), after.decode(ids).double()
        error = (x - y).square().sum(1)
        cosines = F.cosine_similarity(x, y, eps=1e-30)
        direction += float(torch.where(error > 0, 1 - cosines, 0.0).sum())
        squares, norms = squares + float(error.sum()), norms + float(x.square().sum())
    rows = before.num_embeddings
    return AddedError(
        max(0.0, direction) / rows, squares / (rows * before.embedding_dim), squares / norms if norms else 0.0
    )


def _values(table: PackedTable, tier: Tier, ids: Tensor) -> Tensor:
    """Return the values (n, 32 G) fp32 that the records of rows ids (n,) of a tier decode to, unscaled."""
    plain = table.tiers.clone()
    plain[:, 0] = 0
    codes = (table.records, table.directory, plain, table.levels)
    ones, width = torch.ones(table.num_embeddings), GROUP * (plain.shape[1] - 1)
    values = decode_rows(ids, PackedTensors(*codes, ones), width)[:, : GROUP * len(tier.bits)]
    if not tier.transform:
        values[:, table.embedding_dim :] = 0  # any values, which no row has
    return values


def _spread(table: PackedTable, tier: Tier) -> Tensor | None:
    """Return what errors of the values of a tier are multiplied with in its rows (32 G,), None for ones."""
    width = GROUP * len(tier.bits)
    if tier.transform:
        assert table.basis is not None, "a table with such a tier has a basis"
        return torch.linalg.vector_norm(table.basis[:width].float(), dim=1)
    missing = max(0, width - table.embedding_dim)
    return F.pad(torch.ones(width - missing), (0, missing)) if missing else None


def _encoded(tier: Tier, values: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes (n, 32 G) uint8 of values, and the factors (n,) of their scales."""
    bits = torch.tensor(tier.bits, dtype=torch.uint8)
    kept = torch.ones(len(values))
    if int(bits.max()) <= LEVEL_BITS:
        codes, factors, _ = RowCodes(spread).encode(tier, values)
        return codes, factors
    middles = (2.0 ** bits.repeat_interleave(GROUP).float() - 1) / 2
    codes = (values + middles).round().clamp(0, 255).to(torch.uint8)  # of uniform codes, exactly
    narrow = bits <= LEVEL_BITS
    if bool(narrow.any()):
        own = narrow.repeat_interleave(GROUP)
        weights = None if spread is None else spread[own]
        codes[:, own] = quantize_trellis(
            values[:, own], weights, bits[narrow], packed_levels(), kept.unsqueeze(1), needs_codes=True
        )[0]
    return codes, kept
