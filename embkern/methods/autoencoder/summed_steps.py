"""Steps whose gradients are summed over shards in a fixed order, on one process or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.reference import SUM
from ..base import row_blocks
from ..sharded import Section, World
from .steps import Adam, Objective, Weights


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
        with self.world.one_thread(self.objective.by_blas(self.weights)):
            for batch in order.split(batch_size):
                ids = batch.sort().values  # a batch is a set; in order, its rows are read from front to back
                objective, from_root = self._without_root(sections, ids, alpha)
                leaves = (self._leaf(section, ids, objective, alpha) for section in sections)
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
        ends = torch.tensor([section.start, section.start + len(section.rows)], device="cpu")
        first, last = torch.searchsorted(ids, ends).tolist()
        yield from row_blocks(section.rows, ids[first:last] - section.start)
