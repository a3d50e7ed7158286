"""Rows of a table that is dense or compressed, so that callers need not decode all of it."""

from __future__ import annotations

from torch import Tensor

from .factors import Factors
from .packed import PackedTable
from .rows import RowTable

AnyTable = Tensor | Factors | PackedTable | RowTable


def shape_of(table: AnyTable) -> tuple[int, int]:
    """Return (V, H) of a table (V, H), dense or compressed."""
    if isinstance(table, Tensor):
        return table.shape[0], table.shape[1]
    return table.num_embeddings, table.embedding_dim


def rows_of(table: AnyTable, ids: Tensor) -> Tensor:
    """Return the rows of ids (n,), which may be on another device: (n, H)."""
    if isinstance(table, Tensor):
        return table[ids.to(table.device)]
    return table.decode(ids.to(next(iter(table.tensors().values())).device))
