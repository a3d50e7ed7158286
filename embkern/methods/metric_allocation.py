"""The objective of rate allocation with a calibration: the divergence from the dense model that errors cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .allocation import SAMPLED_ROWS, Allocation, Basis, read_often
from .calibration import Calibration
from .row_codes import BLOCK_ROWS

RIDGE = 1e-3  # added to the metric, relative to its mean eigenvalue: the calibration may lack a direction
WEIGHTED_ROWS = 2048  # rows of the most weight, whose errors are measured at every tier


@dataclass
class RowMetric:
    """What the error e of row i costs: ``inputs[i] * e @ G @ e + predictions[i] * e @ S @ e``.

    Attributes:
        inputs, predictions: (V,) float64, weights of the rows as inputs and in a tied head, or None.
        input_metric, head_metric: (H, H) float32, G and S, or None.
    """

    inputs: Tensor | None
    predictions: Tensor | None
    input_metric: Tensor | None
    head_metric: Tensor | None

    def parts(self):
        """Return the weights and the matrix of every part."""
        pairs = ((self.inputs, self.input_metric), (self.predictions, self.head_metric))
        return [(w, m) for w, m in pairs if w is not None and m is not None]

    def weights(self) -> Tensor:
        """Return the weights (V,) of rows, with a sum of 1, all parts together."""
        total = sum(w * m.diagonal().double().sum() for w, m in self.parts())
        return total / total.sum()

    def matrix(self) -> Tensor:
        """Return the metric (H, H) float64 in which rows are quantised: every part counts alike."""
        return sum(m.double() / m.diagonal().double().sum() for _, m in self.parts())

    def forms(self, errors: Tensor) -> Tensor:
        """Return ``e @ m @ e`` (P, n) float32 of errors (n, H) in every part's matrix."""
        return torch.stack([((errors @ m) * errors).sum(1) for _, m in self.parts()])

    def cost(self, ids: Tensor, forms: Tensor) -> Tensor:
        """Return the weighted sum (n,) float64 of forms (P, n)."""
        return sum(w[ids] * form for (w, _), form in zip(self.parts(), forms.double()))


class MetricAllocation(Allocation):
    """Weighs errors as a model sees them: a row costs the divergence that its error causes."""

    basis_share = 1.0
    most_bits = 4

    def __init__(self, rows: Tensor, metric: RowMetric, dtype: torch.dtype, budget: int) -> None:
        self.metric, self.weights = metric, metric.weights()
        matrix = metric.matrix()
        self.matrix = (matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64))
        super().__init__(rows, dtype, budget)

    def _find_basis(self, size: int) -> Basis:
        """Return principal axes, in the metric, of the directions of infrequent rows."""
        values, vectors = torch.linalg.eigh(self.matrix)
        root, inverse = (vectors * values.sqrt()) @ vectors.t(), (vectors / values.sqrt()) @ vectors.t()
        weights = torch.where(read_often(self.weights), 0.0, self.weights).sqrt()
        total = torch.zeros_like(self.matrix)
        for part, norm, weight in zip(*(each.split(BLOCK_ROWS) for each in (self.rows, self.norms, weights))):
            weighted = part * (weight / norm.clamp_min(1e-30)).float().unsqueeze(1)
            total += (weighted.t() @ weighted).double()
        values, vectors = torch.linalg.eigh(root @ total @ root)
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size]
        spread = (values / weights.square().sum()).sqrt()
        extra = size - len(spread)
        analysis = F.pad(root @ vectors, (0, extra))
        synthesis = F.pad((vectors.t() @ inverse) * spread.unsqueeze(1), (0, 0, 0, extra))
        return Basis(analysis.float(), F.pad(spread, (0, extra)).float(), synthesis.float())

    def costs(self, *, exact: bool = False) -> Tensor:
        count = len(self.rows)
        every = torch.arange(count)
        some = torch.arange(0, count, max(1, count // SAMPLED_ROWS))
        heavy = self.weights.argsort(descending=True, stable=True)[: min(WEIGHTED_ROWS, count)]
        measured = torch.cat([some, heavy])
        costs = []
        for index, (codes, tier) in enumerate(zip(self.codes, self.tiers)):
            if exact:
                costs.append(self.metric.cost(every, self._forms(index, every)))
                continue
            estimate = self._energy(codes.values if codes.spread is None else codes.values * codes.spread)
            estimate = (estimate - codes.scalar_projections(tier, every).square()).clamp_min(0)
            forms = self._forms(index, measured)
            ratio = forms[:, : len(some)].double().sum(1) / estimate[some].double().sum().clamp_min(1e-300)
            cost = self.metric.cost(every, ratio.unsqueeze(1) * estimate)
            cost[measured] = self.metric.cost(measured, forms)
            costs.append(cost)
        return torch.stack(costs, 1)

    def _forms(self, index, ids):
        parts = []
        for part in ids.split(BLOCK_ROWS):
            table = self.packed([index], torch.zeros_like(part), part)
            parts.append(self.metric.forms(self.rows[part] - table.to_dense().float()))
        return torch.cat(parts, 1)

    def _energy(self, values):
        return torch.cat([part.square().sum(1) for part in values.split(BLOCK_ROWS)])

    def cosines(self) -> Tensor:
        raise NotImplementedError

    def _fit_weights(self, ids: Tensor) -> Tensor:
        return self.weights[ids]

    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        seen = y @ self.matrix.float()
        return (x * seen).sum(1) / (y * seen).sum(1).clamp_min(1e-30)

    def _cost(self, ids: Tensor, x: Tensor, y: Tensor) -> float:
        return float(self.metric.cost(ids, self.metric.forms(x - y)).sum())
