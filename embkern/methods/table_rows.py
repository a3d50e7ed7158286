"""The rows of a table in fp32 on the CPU, a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..io.mapped_table import TableFile
from .base import Rows, take_rows
from .sharded import World

BLOCK_ROWS = 4096  # rows that are quantised at a time
BLOCK_VALUES = 4096 * 768  # upper bound of their values, 13 MB in fp32, for wide rows


def block_rows(width: int) -> int:
    """Return the number of rows of this width in a block."""
    return max(1, min(BLOCK_ROWS, BLOCK_VALUES // width))


class TableRows:
    """Reads a table, in memory or in a file, without a copy of all of it.

    Args:
        table: (V, H), floating-point, on any device.
        exponents: (V,) int32, powers of two by which rows of extreme length are divided; None for none.
        world: the processes among which the blocks are divided; None for this one alone.
    """

    def __init__(self, table: Rows, exponents: Tensor | None = None, world: World | None = None) -> None:
        self.table, self.exponents, self.world = table, exponents, world or World()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def width(self) -> int:
        """H, the number of columns."""
        return self.table.shape[1]

    @functools.cached_property
    def norms(self) -> Tensor:
        """Lengths (V,) of the rows."""
        norms = torch.zeros(len(self))
        for place, rows in self.blocks():
            norms[place] = torch.linalg.vector_norm(rows, dim=1)
        return self.world.merge(norms)

    @property
    def block_rows(self) -> int:
        """The number of rows in a block."""
        return block_rows(self.width)

    @property
    def block_count(self) -> int:
        """The number of blocks of all processes."""
        return -(-len(self) // self.block_rows)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows in blocks, those of this process, and where each block lies in the table."""
        size = self.block_rows
        for block in self.world.own_blocks(self.block_count):
            start, stop = block * size, min((block + 1) * size, len(self))
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
