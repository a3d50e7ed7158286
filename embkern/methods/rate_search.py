"""The search for the tier of every row that minimises the weighted error within a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..ops.packed_format import MAX_TIERS, Tier

_ROWS = 1 << 14  # rows whose costs are compared at a time


class RateSearch:
    """Chooses a subset of the tiers, and one tier of the subset for every row.

    The costs are read in blocks of rows and never copied; beside them a search holds 8 bytes a row.

    Args:
        cost: (T, V) float64, what every row costs at every tier; infinite where a tier is not allowed.
        tiers: the T tiers.
        shared_bytes: maps the tiers in use to the bytes of a table besides its records.
    """

    def __init__(self, cost: Tensor, tiers: list[Tier], shared_bytes: Callable[[list[Tier]], int]) -> None:
        self.cost, self.tiers, self.shared_bytes = cost, tiers, shared_bytes
        self.bytes = torch.tensor([4.0 * tier.words for tier in tiers], dtype=torch.float64)

    def within(self, budget: int, most: int) -> tuple[list[int], Tensor] | None:
        """Return indices of up to ``most`` tiers, and for every row its position (V,) in that list.

        More than ``most`` tiers are returned where fewer do not fit the budget. The result is None where no
        choice fits.
        """
        kept = list(range(len(self.tiers)))
        if self._smallest(kept) > budget:
            return None
        price = self._price(kept, budget)
        while len(kept) > most and (dropped := self._cheapest_to_drop(kept, price, budget)) is not None:
            kept.remove(dropped)
        if len(kept) > MAX_TIERS:
            return None
        while True:
            choice = self._fill_budget(kept, budget)
            used = torch.nonzero(choice.bincount(minlength=len(kept))).flatten().tolist()
            if len(used) == len(kept):
                return kept, choice
            kept = [kept[i] for i in used]  # unused tiers are dropped, and their share is spent

    def cost_of(self, kept: list[int], choice: Tensor) -> float:
        """Return the total cost of what ``within`` returned."""
        tier_of = torch.tensor(kept)
        parts = (self._taken(tier_of[choice[rows]], rows.start) for rows in self._blocks())
        return float(torch.cat(list(parts)).sum())

    def least_bytes(self) -> float:
        """Return the bytes of the smallest table, with or without a basis."""
        return min(self._smallest(kept) for kept in self.with_and_without_basis())

    def with_and_without_basis(self) -> tuple[list[int], list[int]]:
        """Return the indices of all tiers, and of those of values."""
        plain = [i for i, tier in enumerate(self.tiers) if not tier.transform]
        return list(range(len(self.tiers))), plain

    def smallest(self, kept: list[int]) -> Tensor:
        """Return the choice (V,) of the fewest bytes among these tiers."""
        return torch.cat([_least(self._sizes(kept, rows))[1] for rows in self._blocks()])

    def _blocks(self) -> Iterator[slice]:
        """Yield where blocks of rows lie in the table."""
        count = self.cost.shape[1]
        return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))

    def _taken(self, tier_of: Tensor, first: int) -> Tensor:
        """Return the costs (n,) of consecutive rows from the first on, each at its tier (n,)."""
        return self.cost[tier_of, torch.arange(first, first + len(tier_of))]

    def _sizes(self, kept: list[int], rows: slice) -> Iterator[Tensor]:
        """Yield by tier the bytes (n,) of rows, infinite where the tier is not allowed."""
        return (torch.where(torch.isfinite(self.cost[i, rows]), self.bytes[i], math.inf) for i in kept)

    def _prices(self, kept: list[int], rows: slice, price: float) -> Iterator[Tensor]:
        """Yield by tier what rows (n,) cost, bytes included."""
        return (self.cost[i, rows] + price * self.bytes[i] for i in kept)

    def _smallest(self, kept: list[int]) -> float:
        """Return the bytes of the smallest table with these tiers."""
        least = sum(float(_least(self._sizes(kept, rows))[0].sum()) for rows in self._blocks())
        return least + self._shared(kept)

    def _shared(self, kept: list[int]) -> int:
        return self.shared_bytes([self.tiers[i] for i in kept])

    def _price(self, kept: list[int], budget: int) -> float:
        """Bisect for the least multiplier whose choice fits the budget, to a relative accuracy of 1e-6."""
        size, shared = self.bytes[kept], self._shared(kept)

        def fits(price: float) -> bool:
            chosen = (_least(self._prices(kept, rows, price))[1] for rows in self._blocks())
            return sum(float(size[choice].sum()) for choice in chosen) + shared <= budget

        low, high = 0.0, 1e-9
        while not fits(high):
            low, high = high, high * 8
        if low == 0.0 and fits(0.0):
            return 0.0
        while high > low * (1 + 1e-6):
            middle = math.sqrt(low * high) if low else high / 8
            if middle < 1e-30:
                break
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _cheapest_to_drop(self, kept: list[int], price: float, budget: int) -> int | None:
        """Return the tier whose removal raises the Lagrangian least while the rest still fits, or None."""
        rise = torch.zeros(len(kept), dtype=torch.float64)
        for rows in self._blocks():
            least, second, number = _two_least(self._prices(kept, rows, price))
            rise.index_add_(0, number, second - least)
        everything = self._shared(kept)
        for position, index in enumerate(kept):
            rise[position] += price * (self._shared([i for i in kept if i != index]) - everything)
        for position in rise.argsort().tolist():
            if self._smallest([i for i in kept if i != kept[position]]) <= budget:
                return kept[position]
        return None

    def _fill_budget(self, kept: list[int], budget: int) -> Tensor:
        """Return the choice (V,) at the budget's price, remaining bytes spent where they gain most."""
        price, size, tier_of = self._price(kept, budget), self.bytes[kept], torch.tensor(kept)
        choice, spent = torch.empty(self.cost.shape[1], dtype=torch.int64), float(self._shared(kept))
        upgrades = []
        for rows in self._blocks():
            own, richer = (_least(self._prices(kept, rows, each))[1] for each in (price, price * (1 - 1e-5)))
            choice[rows] = own
            spent += float(size[own].sum())
            more = size[richer] - size[own]
            gain = self._taken(tier_of[own], rows.start) - self._taken(tier_of[richer], rows.start)
            some = torch.nonzero(more > 0).flatten()
            upgrades.append((rows.start + some, richer[some], more[some], gain[some]))
        ids, richer, more, gain = (torch.cat(parts) for parts in zip(*upgrades, strict=True))
        order = (gain / more).argsort(descending=True, stable=True)
        upgraded = order[more[order].cumsum(0) <= budget - spent]
        choice[ids[upgraded]] = richer[upgraded]
        return choice


def _least(values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the least of some tensors (n,), value by value, and the number (n,) of the first that has it."""
    values = iter(values)
    least = next(values)
    number = torch.zeros(len(least), dtype=torch.int64)
    for index, value in enumerate(values, 1):
        number.masked_fill_(value < least, index)
        least = torch.minimum(least, value)
    return least, number


def _two_least(values: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two least of some tensors (n,), value by value, and the number (n,) of the first of them."""
    values = iter(values)
    least = next(values)
    second, number = torch.full_like(least, math.inf), torch.zeros(len(least), dtype=torch.int64)
    for index, value in enumerate(values, 1):
        number.masked_fill_(value < least, index)
        second = torch.minimum(second, torch.maximum(least, value))
        least = torch.minimum(least, value)
    return least, second, number
