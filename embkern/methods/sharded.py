"""Steps whose gradient is a sum over shards of the table, and the processes that share the shards out.

The rows are cut into a fixed number of shards, whatever the number of processes. A step adds the shards'
summed gradients in one fixed order, so that the result does not depend on who computed which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ops.reference import SUM
from .base import row_blocks
from .steps import Adam, Objective, Weights

Result = TypeVar("Result")


class Section(NamedTuple):
    """Consecutive rows of a table, and the id of the first."""

    start: int
    rows: Tensor


class World:
    """The processes of a run and their shards: here one process that has all of them."""

    rank, size = 0, 1

    def __init__(self, shards: int = 1) -> None:
        self.shards = shards

    @property
    def owned(self) -> range:
        """The shards of this process."""
        return range(self.shards * self.rank // self.size, self.shards * (self.rank + 1) // self.size)

    def sections(self, rows: Tensor) -> list[Section]:
        """Cut a table (V, H) into shards of consecutive rows and return those of this process."""
        bounds = [len(rows) * shard // self.shards for shard in range(self.shards + 1)]
        return [Section(bounds[shard], rows[bounds[shard] : bounds[shard + 1]]) for shard in self.owned]

    def gather(self, leaves: Tensor) -> Tensor:
        """Return the leaves of all shards (shards, n), given those of this process."""
        return leaves

    def sum(self, leaves: Tensor) -> Tensor:
        """Add the leaves (owned, n) of all shards, first to last: (n,)."""
        first, *others = self.gather(leaves)
        total = first.clone()
        for leaf in others:
            total += leaf
        return total

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the first process alone and return its result, or raise its error, on all."""
        return function()


class SummedSteps:
    """Steps of large batches and of sharded tables: a gradient is summed block by block, shard by shard.

    Its memory beyond the table is some copies of the weights and one block of rows.
    """

    def __init__(self, weights: Weights, objective: Objective, world: World) -> None:
        self.weights, self.objective, self.world = weights, objective, world

    @torch.no_grad()
    def run(self, sections: list[Section], order: Tensor, batch_size: int, alpha: float, lr: float) -> Tensor:
        """Take the steps of ``order``, the same ids on all processes; see ``Steps``."""
        optimizer, losses = Adam(self.weights), []
        for batch in order.split(batch_size):
            ids = batch.sort().values  # a batch is a set; in order, its rows are read from front to back
            objective, from_root = self._without_root(sections, ids, alpha)
            leaves = torch.stack([self._leaf(section, ids, objective, alpha) for section in sections])
            total = self.world.sum(leaves).div_(len(ids))
            optimizer.step([total[:-1]], lr)
            losses.append(total[-1] + from_root)
        return torch.stack(losses)

    def _leaf(self, section: Section, ids: Tensor, objective: Objective, alpha: float) -> Tensor:
        """Flat gradient and loss (P + 1,), summed over the ids that are in a section."""
        leaf = self.weights.parameters.new_zeros(self.weights.parameters.numel() + 1)
        parts = self.weights.parts(leaf[:-1])
        for rows in self._blocks(section, ids):
            loss, gradients = objective.gradients(self.weights, rows, alpha, SUM)
            for part, gradient in zip(parts, gradients, strict=True):
                part += gradient
            leaf[-1] += loss
        return leaf

    def _without_root(self, sections: list[Section], ids: Tensor, alpha: float) -> tuple[Objective, float]:
        """Turn the batch's root into a squared error with the same gradient; also return what the loss lacks.

        ``d sqrt(m) = dm / (2 sqrt(m))``: a forward pass finds m, the mean squared error of the batch.
        """
        objective = self.objective
        if not objective.rmse_weight:
            return objective, 0.0
        squares = dataclasses.replace(objective, power_weight=0.0)
        leaves = torch.zeros(len(sections), 1, dtype=torch.float64, device=self.weights.parameters.device)
        for leaf, section in zip(leaves, sections, strict=True):
            for rows in self._blocks(section, ids):
                leaf += squares.sums(self.weights, rows, alpha)[1]
        root = float(self.world.sum(leaves) / len(ids)) ** 0.5
        slope = objective.rmse_weight / (2 * root) if root else 0.0
        changed = dataclasses.replace(objective, rmse_weight=0.0, mse_weight=objective.mse_weight + slope)
        return changed, slope * root**2

    def _blocks(self, section: Section, ids: Tensor) -> Iterator[Tensor]:
        """The rows of sorted ids that are in a section, in the weights' dtype, some thousand at a time."""
        ends = torch.tensor([section.start, section.start + len(section.rows)])
        first, last = torch.searchsorted(ids, ends).tolist()
        yield from row_blocks(section.rows, ids[first:last] - section.start)
