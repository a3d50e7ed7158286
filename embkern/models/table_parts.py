"""What a compressed table consists of, as reports tell it: tiers of a packed one, tensors of a row table."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ..tables import PrunedPackedTable, RowTable, Table
from ..tables.kept_rows import KeptRowsTable
from ..tables.packed import PackedTable

CORE_OF = "core_of"  # the fact that names the table whose central core another one shares


class TierUse(BaseModel):
    """The rows of one tier of a packed table."""

    name: str = Field(description="bits per value, or bits of each group of coefficients in the basis")
    rows: int = Field(description="number of rows")
    bytes: int = Field(description="bytes of their records, without scales and directory")


def tier_uses(table: Table) -> list[TierUse]:
    """Return the tiers of a packed table, of all rows or of some; others have none."""
    if isinstance(table, PrunedPackedTable):
        table = table.packed
    if not isinstance(table, PackedTable):
        return []
    tiers = table.described_tiers()
    rows = table.tier_of_rows().bincount(minlength=len(tiers)).tolist()
    return [
        TierUse(name=str(tier), rows=count, bytes=4 * tier.words * count)
        for tier, count in zip(tiers, rows, strict=True)
    ]


def tensor_bytes(table: Table) -> dict[str, int]:
    """Return the bytes of each tensor of a row table, by name; nothing of factors and packed tables."""
    if not isinstance(table, RowTable):
        return {}
    shared = ("core_2",) if CORE_OF in table.facts else ()
    return {name: tensor.nbytes for name, tensor in table.tensors().items() if name not in shared}


def stored_bytes(table: Table) -> int:
    """Return the bytes that a table adds to a model: without a central core that another one stores."""
    return sum(tensor_bytes(table).values()) if isinstance(table, RowTable) else table.nbytes


def rows_kept(table: Table) -> int | None:
    """Return how many rows a table stores that leaves some out; None of others."""
    return table.kept if isinstance(table, KeptRowsTable) else None
