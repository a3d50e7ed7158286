"""The rows of a table in fp32 on the CPU, a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..io.mapped_table import TableFile
from .base import Rows, take_rows

BLOCK_ROWS = 4096  # rows that are quantised at a time


class TableRows:
    """Reads a table, in memory or in a file, without a copy of all of it.

    Args:
        table: (V, H), floating-point, on any device.
        exponents: (V,) int32, powers of two by which rows of extreme length are divided; None for none.
    """

    def __init__(self, table: Rows, exponents: Tensor | None = None) -> None:
        self.table, self.exponents = table, exponents

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        """H, the number of columns."""
        return self.table.shape[1]

    @functools.cached_property
    def norms(self) -> Tensor:
        """Lengths (V,) of the rows."""
        return torch.cat([torch.linalg.vector_norm(rows, dim=1) for _, rows in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows in blocks, and where each block lies in the table."""
        for start in range(0, len(self), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, len(self))
            table = self.table
            rows = table.read(start, stop) if isinstance(table, TableFile) else table[start:stop]
            place = slice(start, stop)
            yield place, self._usual(rows, place)

    def take(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (n,): (n, H)."""
        return self._usual(take_rows(self.table, ids), ids)

    def _usual(self, rows: Tensor, which: slice | Tensor) -> Tensor:
        """Return rows in fp32, divided by their powers of two."""
        if self.exponents is None:
            return rows.to("cpu", torch.float32)
        divided = torch.ldexp(rows.to("cpu", torch.float64), -self.exponents[which].unsqueeze(1))
        return divided.float()
