"""Levels that are sums of entries of small tables, those of packed tables among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embkern.ops.packed_codes import packed_levels

from .trellis import Trellis, normal_samples, squared_error

ROW = 640  # values of a ring


@dataclass(frozen=True)
class Sums:
    """Levels that are sums of entries of small tables.

    ``fields[k]`` has, per bit of the index in table k, the bits of the state whose sum modulo 2 it is.
    """

    fields: tuple[tuple[tuple[int, ...], ...], ...]

    def entries(self, states: Tensor) -> Tensor:
        """Return, per state, the places (states, tables) of its entries in all tables side by side."""
        places, first = [], 0
        for field in self.fields:
            index = torch.zeros_like(states)
            for place, mask in enumerate(field):
                for bit in mask:
                    index = index ^ ((states >> bit & 1) << place)
            places.append(index + first)
            first += 2 ** len(field)
        return torch.stack(places, 1)

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each table."""
        return [2 ** len(field) for field in self.fields]

    def levels(self, entries: Tensor, memory: int) -> Tensor:
        """Return levels (values, 2^memory) of tables side by side (values, E)."""
        return entries[:, self.entries(torch.arange(2**memory))].sum(2)

    def fit(self, trellis: Trellis, entries: Tensor, steps: int, count: int, seed: int) -> Tensor:
        """Return better tables, by Lloyd's iteration with least squares for the entries."""
        width = entries.shape[1]
        of_states = self.entries(torch.arange(2**trellis.memory))
        for step in range(steps):
            samples = normal_samples(trellis.ring, count, 1000 * seed + step + 1)
            states = trellis.states(samples, self.levels(entries, trellis.memory)).flatten()
            present = torch.zeros(len(states), width).scatter_(1, of_states[states], 1.0)
            # The tables are known up to constants; a weak pull to the present ones fixes these.
            pull = 1e-3 * len(states) / width
            left = (present.T @ present).double() + pull * torch.eye(width, dtype=torch.float64)
            given = samples.view(-1, trellis.values)
            right = (present.T @ given).double() + pull * entries.T.double()
            entries = torch.linalg.solve(left, right).T.float()
        return entries

    def trained(self, trellis: Trellis, starts: int = 10) -> Tensor:
        """Return tables side by side (values, E), the best of some random starts."""
        spread = math.sqrt((1 - 4.0**-trellis.bits) / len(self.fields))
        check = normal_samples(trellis.ring, 35_000, 2**20)

        def error(entries: Tensor) -> float:
            return squared_error(trellis, self.levels(entries, trellis.memory), check)

        found = []
        for start in range(starts):
            generator = torch.Generator().manual_seed(start)
            entries = torch.randn(trellis.values, sum(self.sizes), generator=generator) * spread
            found.append(self.fit(trellis, entries, 12, 7000, start))
        found.sort(key=error)
        found = [self.fit(trellis, entries, 10, 23_000, 100 + i) for i, entries in enumerate(found[:3])]
        return self.fit(trellis, min(found, key=error), 8, 86_000, 200)

    def whole(self, entries: Tensor, memory: int) -> Tensor:
        """Return tables of whole numbers near to tables side by side (values, E), up to constants.

        Where a sum would be above 127, the largest of its entries are smaller.
        """
        tables = list(entries.split(self.sizes, 1))
        means = [each.mean(1, keepdim=True) for each in tables]
        tables = [each - mean for each, mean in zip(tables, means, strict=True)]
        tables[0] = tables[0] + sum(means)  # Only sums have a meaning: all entries become small.
        rounded, places = torch.cat(tables, 1).round(), self.entries(torch.arange(2**memory))
        for own in rounded:
            while (sums := own[places].sum(1)).abs().max() > 127:
                summands = places[sums.abs().argmax()]
                own[summands[own[summands].abs().argmax()]] -= sums[sums.abs().argmax()].sign()
        return rounded


_LOW = ((4,), (5,), (6,), (7,))
_MIXED = ((0, 8), (1, 9), (2, 10), (3, 11))
_OTHER = ((3, 8), (4, 9), (5, 10), (6, 11))
# The tables of `sums-4096` by bits a value, as docs/packed-format.md defines them. Bits 12 and 13 of a state
# are those of a value that no other value depends on.
SUMS_4096 = {
    1: Sums((_LOW, _MIXED, _OTHER)),
    2: Sums((_LOW, _MIXED, _OTHER)),
    3: Sums((_LOW, _MIXED, (*_OTHER, (12,)))),
    4: Sums((_LOW, _MIXED, _OTHER, ((12,), (13,), (2, 10), (3, 11)))),
}


def trellis_of_sums(bits: int, ring: int = ROW) -> Trellis:
    """Return the trellis of `sums-4096`: windows of 12 bits of a stream of two bits a step.

    A step is a value or, at one bit, a pair of values.
    """
    return Trellis(bits, 12, ring, coded=2, values=2 if bits == 1 else 1)


def packed_entries(bits: int) -> Tensor:
    """Return the tables (values, E) of packed tables side by side, whole numbers."""
    sizes = {each: trellis_of_sums(each).values * sum(SUMS_4096[each].sizes) for each in SUMS_4096}
    parts = packed_levels().float().flatten().split(list(sizes.values()))
    return parts[bits - 1].view(trellis_of_sums(bits).values, -1)
