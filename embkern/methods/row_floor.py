"""A least cosine for every row: tiers that fall below it are found while the search chooses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .allocation import Allocation

# Once a tier of a row has been measured, those whose estimated error is above that of the floor by this
# factor are excluded unmeasured.
_MARGIN = 1.25
_ROWS = 1 << 14  # rows whose costs are changed at a time


class RowFloor:
    """Excludes the tiers at which the cosine of a row with the original would be below a floor.

    Encoding every row at every tier takes as long as ten allocations. Here a row is encoded only at the tiers
    that the search chooses for it: those that turn out to be below the floor are excluded, with all that are
    estimated to be worse, and the search is repeated. What it chooses in the end has been measured.

    Args:
        allocation: the rows.
        floor: the least cosine.
        costs: (T, V) float64, the estimated costs of rows at tiers, made infinite where tiers are excluded.
    """

    def __init__(self, allocation: Allocation, floor: float, costs: Tensor) -> None:
        self.allocation, self.floor, self.costs = allocation, floor, costs
        self.measured = torch.zeros_like(costs, dtype=torch.bool)
        self.best = torch.full((costs.shape[1],), -1.0, dtype=torch.float64)
        words = torch.tensor([tier.words for tier in allocation.tiers])
        transform = torch.tensor([tier.transform for tier in allocation.tiers])
        alike = transform == transform.unsqueeze(1)
        self.lower = alike & (words <= words.unsqueeze(1))  # by tier, those that have no more bits
        self.finest = int(torch.where(transform, -1, words).argmax())

    def holds(self, kept: list[int], choice: Tensor) -> bool:
        """Return whether all rows reach the floor at their choice (V,) among tiers ``kept``.

        Raises:
            ValueError: a row is below the floor at every tier.
        """
        tier_of, holds = torch.tensor(kept)[choice], True
        for index in torch.unique(tier_of).tolist():
            ids = torch.nonzero((tier_of == index) & ~self.measured[index]).flatten()
            cosines = self.allocation.cosines(index, ids)
            self.measured[index, ids] = True
            self.best[ids] = torch.maximum(self.best[ids], cosines)
            below = cosines < self.floor
            if below.any():
                for some, found in zip(ids[below].split(_ROWS), cosines[below].split(_ROWS), strict=True):
                    self._exclude(index, some, found)
                holds = False
        return holds

    def _exclude(self, index: int, ids: Tensor, cosines: Tensor) -> None:
        """Exclude tiers of rows (n,) with these cosines at a tier."""
        costs = self.costs[:, ids]
        most = _MARGIN * (1 - self.floor) / (1 - cosines) * costs[index]
        worse = (costs > most) & ~self.measured[:, ids]
        worse[self.finest] = False
        costs[worse | self.lower[index].unsqueeze(1)] = math.inf
        self.costs[:, ids] = costs
        if bool(torch.isinf(costs).all(0).any()):
            finest = self.allocation.cosines(self.finest, torch.arange(self.costs.shape[1]))
            least = math.floor(float(torch.maximum(self.best, finest).min()) * 1e4) / 1e4
            raise ValueError(
                f"floor: expected at most {least}, the worst row's cosine at its best, got {self.floor}"
            )
