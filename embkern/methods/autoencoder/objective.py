"""The loss of the autoencoder, with its gradients and its terms over blocks of rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import cosine_mse_loss
from ...ops.autoencoder import autoencoder_forward
from ...ops.backends import select
from ...ops.reference import MEAN, SUM
from ...tables.factors import activate
from .targets import Targets
from .weights import Weights

PART_ROWS = 1024  # rows whose sums torch computes at a time, with a dozen temporaries of their size


@dataclass(frozen=True)
class Objective:
    """The loss of ``autoencoder``: the weights of its terms, and the lower bound of |x||y| in the cosine."""

    cosine_weight: float
    mse_weight: float
    rmse_weight: float
    power_weight: float
    eps: float

    def gradients(
        self,
        weights: Weights,
        targets: Targets,
        alpha: float,
        reduction: int = MEAN,
        backend: str | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of a block of rows and its gradients by the four parts of the weights.

        Args:
            weights: the weights.
            targets: rows (N, H) and their norms.
            alpha: exponent of the power term.
            reduction: ``MEAN`` or ``SUM`` over the rows.
            backend: of the op; None selects one.
        """
        rows = targets.rows
        if reduction == SUM and len(rows) > PART_ROWS and self.computed_by_torch(weights):
            return self._gradients_in_parts(weights, targets, alpha)
        backend = backend or select("autoencoder", rows.device.type, rows.dtype)
        if weights.activation is None and backend != "torch":
            terms, _, *gradients = autoencoder_forward(
                rows,
                (None, *weights.parts()),
                targets.norms,
                (reduction, *self.term_weights, alpha, self.eps),
                needs_grad=True,
                backend=backend,
            )
            return terms[0], gradients
        parts = [part.detach().requires_grad_() for part in weights.parts()]
        with torch.enable_grad():
            codes = activate(F.linear(rows, *parts[:2]), weights.activation)
            output = activate(torch.addmm(parts[3], codes, parts[2]), weights.activation)
            loss = self._loss(output, targets, alpha, "mean" if reduction == MEAN else "sum")
        return loss.detach(), list(torch.autograd.grad(loss, parts))

    def _gradients_in_parts(
        self, weights: Weights, targets: Targets, alpha: float
    ) -> tuple[Tensor, list[Tensor]]:
        first, *others = targets.split(PART_ROWS)
        loss, gradients = self.gradients(weights, first, alpha, SUM)
        for part in others:
            part_loss, part_gradients = self.gradients(weights, part, alpha, SUM)
            loss = loss + part_loss
            for gradient, addition in zip(gradients, part_gradients, strict=True):
                gradient += addition
        return loss, gradients

    def term_sums(self, weights: Weights, targets: Targets, alpha: float) -> Tensor:
        """Return sums (3,) over a block of rows: cosine distance, squared error (mean over H) and power term.

        The power term is 0 where ``power_weight`` is.
        """
        rows = targets.rows
        if len(rows) > PART_ROWS and self.computed_by_torch(weights):
            parts = targets.split(PART_ROWS)
            return torch.stack([self.term_sums(weights, part, alpha) for part in parts]).sum(0)
        if weights.activation is None:
            backend = select("autoencoder", rows.device.type, rows.dtype)
            options = (SUM, 0.0, 0.0, 0.0, self.power_weight, alpha, self.eps)
            parameters = (None, *weights.parts())
            return autoencoder_forward(
                rows, parameters, targets.norms, options, needs_grad=False, backend=backend
            )[0][1:]
        output = weights.decode(weights.encode(rows))
        no_terms = Objective(0.0, 0.0, 0.0, 0.0, self.eps)
        sums = [
            dataclasses.replace(no_terms, **{name: 1.0})._loss(output, targets, alpha, "sum")
            for name in ("cosine_weight", "mse_weight", "power_weight")
            if name != "power_weight" or self.power_weight
        ]
        return torch.stack(sums + [torch.zeros_like(sums[0])] * (3 - len(sums)))

    def computed_by_torch(self, weights: Weights) -> bool:
        """Return whether torch computes the loss, whose sums then depend on the number of threads.

        The sums of embkern's own ops do not.
        """
        flat = weights.parameters
        return (
            weights.activation is not None or select("autoencoder", flat.device.type, flat.dtype) == "torch"
        )

    @property
    def term_weights(self) -> tuple[float, float, float, float]:
        """The weights of the four terms in the order of the raw ops."""
        return self.cosine_weight, self.mse_weight, self.rmse_weight, self.power_weight

    def value(self, direction: float, squared: float, power: float) -> float:
        """Return the loss, given the means of cosine distance, squared error and power term."""
        return (
            self.cosine_weight * direction
            + self.mse_weight * squared
            + self.rmse_weight * squared**0.5
            + self.power_weight * power
        )

    def _loss(
        self, output: Tensor, targets: Targets, alpha: float, reduction: Literal["mean", "sum"]
    ) -> Tensor:
        return cosine_mse_loss(
            output,
            targets.rows,
            target_norm=targets.norms,
            cosine_weight=self.cosine_weight,
            mse_weight=self.mse_weight,
            rmse_weight=self.rmse_weight,
            power_weight=self.power_weight,
            alpha=alpha,
            eps=self.eps,
            reduction=reduction,
        )
