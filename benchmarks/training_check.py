"""Whether a training loop takes the right steps, against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from embkern.methods.autoencoder.graph import GRAPH_STEPS

from .losses import Terms
from .runner import assert_within, relative_error
from .training_loops import LR, Loop, PlainLoop, Table

CHECKED_STEPS = GRAPH_STEPS + 8  # a captured graph, and steps that do not fill one
CHECKED_FULL_STEPS = {"cpu": 3, "cuda": CHECKED_STEPS}


def ids_of_steps(V: int, batch_size: int, steps: int, seed: int) -> Tensor:
    """Return ids of whole batches: all rows in order for the whole table, else shuffled passes over it."""
    if batch_size >= V:
        return torch.arange(V).repeat(steps)
    generator, per_pass = torch.Generator().manual_seed(seed), V // batch_size * batch_size
    passes = -(-steps * batch_size // per_pass)
    ids = torch.cat([torch.randperm(V, generator=generator)[:per_pass] for _ in range(passes)])
    return ids[: steps * batch_size]


class Check:
    """The check of a loop's first steps against float64: the losses, and the change of the weights."""

    # Where a gradient is only rounding error, Adam changes the weight by the learning rate times its sign.
    SLACK = (3e-5, 2e-3)

    def __init__(self, rows: Tensor, table: Table, terms: Terms, batch_size: int) -> None:
        steps = CHECKED_FULL_STEPS[rows.device.type] if batch_size >= table.V else CHECKED_STEPS
        self.order, self.alpha = ids_of_steps(table.V, batch_size, steps, seed=7), terms.alpha
        exact = PlainLoop(rows.double(), table, terms, batch_size)
        self.exact = self._results(exact)
        self.plain = self._errors(PlainLoop(rows, table, terms, batch_size))

    def __call__(self, loop: Loop) -> float:
        """Take the steps; return the larger relative error, raise AssertionError where it is too large."""
        errors = self._errors(loop)
        limits = [2 * error + slack for error, slack in zip(self.plain, self.SLACK, strict=True)]
        return assert_within(errors, limits, ("losses", "weights"))

    def _results(self, loop: Loop) -> tuple[Tensor, Tensor]:
        start = loop.weights().double()
        losses = loop.run(self.order, self.alpha, LR)
        return losses.double(), loop.weights().double() - start

    def _errors(self, loop: Loop) -> tuple[float, float]:
        results = self._results(loop)
        losses, change = (relative_error(got, exact) for got, exact in zip(results, self.exact, strict=True))
        return losses, change
