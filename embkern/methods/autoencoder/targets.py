"""The rows that an autoencoder reconstructs, with their norms, which never change and are computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Rows, block_rows, blocks, row_blocks, training_blocks, training_dtype
from ..sharded import Section


class Targets(NamedTuple):
    """Rows (N, H) in the dtype of training, and their norms (N,)."""

    rows: Tensor
    norms: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Targets:
        """Return the rows with their norms."""
        return cls(rows, row_norms(rows))

    def split(self, size: int) -> Iterator[Targets]:
        """Yield ``size`` rows at a time, which are not copied."""
        yield from map(Targets, self.rows.split(size), self.norms.split(size))

    def batches(self, ids: Tensor, size: int) -> Iterator[Targets]:
        """Yield the rows of ids ``size`` at a time. The norms of all are gathered at once, in one launch."""
        norms = self.norms.index_select(0, ids).split(size)
        for some, lengths in zip(ids.split(size), norms, strict=True):
            yield Targets(self.rows.index_select(0, some), lengths)


class TargetSection(NamedTuple):
    """Consecutive rows of a table, the id of the first of them, and the norms (n,) of all."""

    start: int
    rows: Rows
    norms: Tensor

    @classmethod
    def of(cls, section: Section) -> TargetSection:
        """Return a section of a table with the norms of its rows."""
        return cls(*section, row_norms(section.rows))

    def blocks(self) -> Iterator[Targets]:
        """Yield the rows in blocks."""
        yield from map(Targets, training_blocks(self.rows), self.norms.split(block_rows(self.rows)))

    def blocks_of(self, ids: Tensor) -> Iterator[Targets]:
        """Yield the rows of those sorted ids of the table that are in this section, in blocks."""
        ends = torch.tensor([self.start, self.start + len(self.rows)], device="cpu")
        first, last = torch.searchsorted(ids, ends).tolist()
        own = ids[first:last] - self.start
        norms = self.norms.index_select(0, own.to(self.norms.device))
        yield from map(Targets, row_blocks(self.rows, own), norms.split(block_rows(self.rows)))


def row_norms(table: Rows) -> Tensor:
    """Return the norms (V,) of a table's rows in the dtype of training, from sums in fp64, block by block."""
    norms = torch.empty(len(table), dtype=training_dtype(table), device=table.device)
    first = 0
    for rows in blocks(table):
        last = first + len(rows)
        norms[first:last] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        first = last
    return norms
