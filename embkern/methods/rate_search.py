"""The search for the tier of every row that minimises the weighted error within a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.packed_format import MAX_TIERS, Tier

_ROWS = 1 << 14  # rows whose costs are compared at a time


class RateSearch:
    """Chooses a subset of the tiers, and one tier of the subset for every row.

    Args:
        cost: (V, T) float64, what every row costs at every tier; infinite where a tier is not allowed.
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
            used = torch.unique(choice)
            if len(used) == len(kept):
                return kept, choice
            kept = [kept[i] for i in used.tolist()]  # unused tiers are dropped, and their share is spent

    def cost_of(self, kept: list[int], choice: Tensor) -> float:
        """Return the total cost of what ``within`` returned."""
        return float(self.cost[:, kept].gather(1, choice.unsqueeze(1)).sum())

    def least_bytes(self) -> float:
        """Return the bytes of the smallest table, with or without a basis."""
        return min(self._smallest(kept) for kept in self.with_and_without_basis())

    def with_and_without_basis(self) -> tuple[list[int], list[int]]:
        """Return the indices of all tiers, and of those of values."""
        plain = [i for i, tier in enumerate(self.tiers) if not tier.transform]
        return list(range(len(self.tiers))), plain

    def smallest(self, kept: list[int]) -> Tensor:
        """Return the choice (V,) of the fewest bytes among these tiers."""
        return self._sizes(kept).argmin(1)

    def _sizes(self, kept: list[int]) -> Tensor:
        """Return the bytes (V, T) of rows at these tiers, infinite where a tier is not allowed."""
        return torch.where(torch.isfinite(self.cost[:, kept]), self.bytes[kept], math.inf)

    def _smallest(self, kept: list[int]) -> float:
        """Return the bytes of the smallest table with these tiers."""
        return float(self._sizes(kept).amin(1).sum()) + self._shared(kept)

    def _shared(self, kept: list[int]) -> int:
        return self.shared_bytes([self.tiers[i] for i in kept])

    def _spent(self, kept: list[int], choice: Tensor) -> float:
        return float(self.bytes[kept][choice].sum()) + self._shared(kept)

    def _price(self, kept: list[int], budget: int) -> float:
        """Bisect for the least multiplier whose choice fits the budget, to a relative accuracy of 1e-6."""
        cost, size = self.cost[:, kept], self.bytes[kept]

        def fits(price: float) -> bool:
            return self._spent(kept, _choice(cost, size, price)) <= budget

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
        value = self.cost[:, kept] + price * self.bytes[kept]
        two = value.topk(2, dim=1, largest=False)
        rise = torch.zeros(len(kept), dtype=torch.float64)
        rise.index_add_(0, two.indices[:, 0], two.values[:, 1] - two.values[:, 0])
        everything = self._shared(kept)
        for position, index in enumerate(kept):
            rise[position] += price * (self._shared([i for i in kept if i != index]) - everything)
        for position in rise.argsort().tolist():
            if self._smallest([i for i in kept if i != kept[position]]) <= budget:
                return kept[position]
        return None

    def _fill_budget(self, kept: list[int], budget: int) -> Tensor:
        """Return the choice (V,) at the budget's price, remaining bytes spent where they gain most."""
        price, cost, size = self._price(kept, budget), self.cost[:, kept], self.bytes[kept]
        choice = _choice(cost, size, price)
        richer = _choice(cost, size, price * (1 - 1e-5))
        more = (size[richer] - size[choice]).clamp_min(0)
        rows = torch.nonzero(more > 0).flatten()
        gain = (cost.gather(1, choice[:, None]) - cost.gather(1, richer[:, None])).squeeze(1)
        rows = rows[(gain[rows] / more[rows]).argsort(descending=True, stable=True)]
        room = budget - self._spent(kept, choice)
        upgraded = rows[more[rows].cumsum(0) <= room]
        choice[upgraded] = richer[upgraded]
        return choice


def _choice(cost: Tensor, size: Tensor, price: float) -> Tensor:
    """Return the tier (V,) of every row that is the cheapest at a price of bytes."""
    return torch.cat([(part + price * size).argmin(1) for part in cost.split(_ROWS)])
