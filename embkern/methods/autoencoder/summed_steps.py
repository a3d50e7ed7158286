"""Training steps whose gradients are summed over shards in a fixed order, for any number of processes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...ops.reference import SUM
from ..sharded import World
from .objective import Objective
from .targets import TargetSection
from .weights import Adam, Weights


class SummedSteps:
    """Steps for large batches and sharded tables: a gradient is summed by blocks, and then by shards.

    Its memory besides the table is a few copies of the weights and one block of rows.
    """

    def __init__(self, weights: Weights, objective: Objective, world: World) -> None:
        self.weights, self.objective, self.world = weights, objective, world

    @torch.no_grad()
    def run(
        self, sections: list[TargetSection], order: Tensor, batch_size: int, alpha: float, lr: float
    ) -> Tensor:
        """Take the steps of ``order``, which has the same ids on all processes; see ``Steps``."""
        optimizer, losses = Adam(self.weights), []
        with self.world.one_thread(self.objective.computed_by_torch(self.weights)):
            for batch in order.split(batch_size):
                # The order in a batch does not matter, and sorted rows are read sequentially.
                ids = batch.sort().values
                objective, loss_difference = self._linearised_root(sections, ids, alpha)
                sums = (self._section_sum(section, ids, objective, alpha) for section in sections)
                total = self.world.sum(sums).div_(len(ids))
                optimizer.step([total[:-1]], lr)
                losses.append(total[-1] + loss_difference)
        return torch.stack(losses)

    def _section_sum(self, section: TargetSection, ids: Tensor, objective: Objective, alpha: float) -> Tensor:
        """Return the flat gradient followed by the loss (P + 1,), summed over the ids in a section."""
        total = self.weights.parameters.new_zeros(self.weights.parameters.numel() + 1)
        parts = self.weights.parts(total[:-1])
        for targets in section.blocks_of(ids):
            loss, gradients = objective.gradients(self.weights, targets, alpha, SUM)
            for part, gradient in zip(parts, gradients, strict=True):
                part += gradient
            total[-1] += loss
        return total

    def _linearised_root(
        self, sections: list[TargetSection], ids: Tensor, alpha: float
    ) -> tuple[Objective, float]:
        """Replace the RMSE term by a squared error with the same gradient, which can be summed by blocks.

        ``d sqrt(m) = dm / (2 sqrt(m))``, with m, the mean squared error of the batch, from a forward pass.
        Also return the difference that the replacement makes to the loss.
        """
        objective = self.objective
        if not objective.rmse_weight:
            return objective, 0.0
        without_power = dataclasses.replace(objective, power_weight=0.0)
        sums = torch.zeros(len(sections), 1, dtype=torch.float64, device=self.weights.parameters.device)
        for total, section in zip(sums, sections, strict=True):
            for targets in section.blocks_of(ids):
                total += without_power.term_sums(self.weights, targets, alpha)[1]
        root = float(self.world.sum(sums) / len(ids)) ** 0.5
        slope = objective.rmse_weight / (2 * root) if root else 0.0
        changed = dataclasses.replace(objective, rmse_weight=0.0, mse_weight=objective.mse_weight + slope)
        return changed, slope * root**2
