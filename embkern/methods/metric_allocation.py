"""Rate allocation with a calibration: rows cost the divergence from the dense model that their errors cause.

To second order, the KL divergence per token is ``0.5 * sum_i f_i * e_i @ G @ e_i`` for the lookups plus
``0.5 * sum_i q_i * e_i @ S @ e_i`` for a tied head (see ``Calibration``). Neither metric is round: a model
reads some directions of a row much more precisely than others. Rows are therefore quantised as coefficients
in a basis that is orthonormal in the metric ``M = G / trace(G) + S / trace(S)`` instead of the plain one, and
whose axes are the principal ones of the rows. Errors of the coefficients are then errors in the metric, and
``allocate``'s water-filling over groups and rows, search of scales and fit of the basis apply unchanged.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tables.reading import AnyTable, rows_of, shape_of
from ..text.frequencies import COMPRESSION_STRENGTH
from ..text.prior import normalized, vocabulary_prior
from .allocation import SAMPLED_ROWS, Allocation, Basis, Values, row_cosines
from .base import row_weights
from .calibration import Calibration
from .table_rows import TableRows, block_rows

# Share of the mean eigenvalue in every eigenvalue of a moment: rows that a calibration has hardly seen are
# read, and predicted, in other directions than those that it has seen. KL divergence of SmolLM2-135M, tied,
# on two texts: at 24x .286 and .109, with a thousandth .316 and .113; at 16x .110 and .039 against .107 and
# .038; at 8x .011 and .0061 against .012 and .0050. It pays where errors are large.
SHRINKAGE = 0.1
HEAVY_ROWS = 2048  # rows of the highest weight, whose errors are measured at every tier
# Strength, in tokens, of the frequencies of the input as a prior of those that a head predicts.
PREDICTION_STRENGTH = 2000.0


@dataclass(frozen=True)
class Form:
    """A sum of weighted quadratic forms: ``(weights * ((errors @ matrix) * errors).sum(1)).sum()``.

    Attributes:
        weights: (V,) float64.
        matrix: (H, H) float64, positive semidefinite and not zero.
    """

    weights: Tensor
    matrix: Tensor

    @property
    def trace(self) -> float:
        """Trace of the matrix."""
        return float(self.matrix.diagonal().sum())

    def of(self, errors: Tensor) -> Tensor:
        """Return the quadratic form (n,) float64 of each of the errors (n, H)."""
        return ((errors @ self.matrix.to(errors.dtype)) * errors).sum(1).double()


def forms_of(
    calibration: Calibration,
    frequencies: Tensor | None,
    *,
    tied: bool,
    exponent: float = 1.0,
    shrinkage: float = 0.0,
) -> list[Form]:
    """Return the forms whose sum is the KL divergence per token that errors in a table cause.

    Args:
        calibration: sums over text.
        frequencies: f, (V,), of the tokens as input; None takes those of the calibration.
        tied: whether an output head uses the table.
        exponent: rows weigh f and q to this power. 1 gives the divergence itself.
        shrinkage: share of the mean eigenvalue of G, and of S, in each of its eigenvalues. 0 gives the
            divergence itself.

    Raises:
        ValueError: the frequencies are not usable, or no gradient and no hidden state differs from zero.
    """
    if frequencies is None:
        frequencies = input_frequencies(calibration)
    inputs = row_weights(frequencies, calibration.num_embeddings)
    parts = [(inputs, calibration.input_moment)]
    if tied and calibration.predictions is not None and calibration.head_moment is not None:
        parts.append((_predicted(calibration.predictions, inputs), calibration.head_moment))
    forms = [
        Form(0.5 * weights**exponent, _shrunk(moment / calibration.scored, shrinkage))
        for weights, moment in parts
    ]
    forms = [form for form in forms if form.trace > 0]
    if not forms:
        raise ValueError(
            "calibration: expected gradients or hidden states other than zero; do the model's outputs depend "
            "on its embedding?"
        )
    return forms


def _shrunk(moment: Tensor, share: float) -> Tensor:
    """Return a matrix of the same trace, with a share of the mean eigenvalue in each of its eigenvalues."""
    mean = moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return (1 - share) * moment + share * mean


def input_frequencies(calibration: Calibration) -> Tensor:
    """Estimate the frequencies (V,) float64 of tokens as input from a calibration alone.

    The prior of the counts is what the model predicts on average, or the order of the ids without a head.
    """
    prior = calibration.predictions
    if prior is None:
        prior = vocabulary_prior(None, calibration.num_embeddings)
    return normalized(calibration.inputs + COMPRESSION_STRENGTH * normalized(prior))


def _predicted(predictions: Tensor, inputs: Tensor) -> Tensor:
    """Return the relative frequencies (V,) that a head predicts, with those of the input as a prior."""
    return normalized(predictions + PREDICTION_STRENGTH * inputs)


def calibration_of_head(calibration: Calibration, frequencies: Tensor | None) -> tuple[Tensor, Calibration]:
    """Return the frequencies and the calibration of an untied output head, for ``allocate`` with it alone.

    The head's sums take the place of the input's: its errors cost ``0.5 * (q * (e @ S * e).sum(1)).sum()``.

    Args:
        calibration: sums over text, with those of a head.
        frequencies: f, (V,), of the tokens as input; None takes those of the calibration.
    """
    predictions, moment = calibration.predictions, calibration.head_moment
    assert predictions is not None, "no head was measured"
    assert moment is not None, "no head was measured"
    inputs = input_frequencies(calibration) if frequencies is None else normalized(frequencies)
    head = dataclasses.replace(
        calibration, inputs=predictions, input_moment=moment, predictions=None, head_moment=None
    )
    return _predicted(predictions, inputs), head


@torch.no_grad()
def predicted_divergence(
    table: Tensor, compressed: AnyTable, calibration: Calibration, frequencies: Tensor, *, tied: bool
) -> float:
    """Return the KL divergence per token, in nats, that a compressed table in place of a table will cause.

    ``0.5 * (f * (e @ G * e).sum(1)).sum() + 0.5 * (q * (e @ S * e).sum(1)).sum()`` with ``e = table -
    compressed``, the second term with a tied head only. It is correct to second order in e, so for small
    divergences, and takes errors of different tokens in one text as independent.

    Args:
        table: (V, H), floating-point.
        compressed: (V, H), likewise, or a compressed table.
        calibration: sums over text.
        frequencies: f, (V,), of the tokens as input.
        tied: whether the model's output head uses the table.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    expected = (calibration.num_embeddings, calibration.embedding_dim)
    for name, rows in (("table", table), ("compressed", compressed)):
        if (shape := shape_of(rows)) != expected:
            raise ValueError(f"{name}: expected shape {expected} as in calibration, got {shape}")
    forms, total = forms_of(calibration, frequencies, tied=tied), 0.0
    for ids in torch.arange(len(table)).split(block_rows(expected[1])):
        errors = table[ids].cpu().float() - rows_of(compressed, ids).cpu().float()
        total += sum(float((form.weights[ids] * form.of(errors)).sum()) for form in forms)
    return total


class MetricAllocation(Allocation):
    """Weighs errors as a model sees them: a row costs ``sum(weight * e @ matrix @ e)`` over some forms.

    The sum of the forms' matrices has to be positive definite: `forms_of` with a shrinkage.
    """

    most_bits = 4
    also_without_basis = True

    def __init__(self, rows: TableRows, forms: list[Form], dtype: torch.dtype, basis_groups: int) -> None:
        self.forms = forms
        weights: Tensor = sum((form.weights * form.trace for form in forms), torch.zeros(len(rows)))
        self.weights = weights / weights.sum()
        self.metric: Tensor = sum((form.matrix / form.trace for form in forms), torch.zeros(()))
        super().__init__(rows, dtype, basis_groups)

    def _find_basis(self, size: int) -> Basis:
        """Return principal axes, in the metric, of the directions of infrequent rows."""
        values, vectors = torch.linalg.eigh(self.metric)
        values = values.clamp_min(SHRINKAGE / 2 * float(values.mean()))  # less only if a moment was made up
        root, inverse = (vectors * values.sqrt()) @ vectors.t(), (vectors / values.sqrt()) @ vectors.t()
        values, vectors = torch.linalg.eigh(root @ self._moment_of_directions() @ root)
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size]
        spread = values.sqrt()
        missing = size - len(spread)  # a width that is no multiple of a group
        return Basis(
            analysis=F.pad(root @ vectors, (0, missing)).float(),
            spread=F.pad(spread, (0, missing)).float(),
            synthesis=F.pad(spread.unsqueeze(1) * (vectors.t() @ inverse), (0, 0, 0, missing)).float(),
        )

    def costs(self) -> Tensor:
        """Estimate the costs from scalar codes.

        The error of scalar codes, in the geometry in which a tier quantises, is turned into every form by the
        ratio that some rows have on average. The rows that weigh most are measured.
        """
        V = len(self.rows)
        sample = torch.arange(0, V, max(1, V // SAMPLED_ROWS))
        heavy = self.weights.argsort(descending=True, stable=True)[:HEAVY_ROWS]
        measured = torch.cat([sample, heavy])
        exact, columns = Values(self, self.rows.take(measured)), self._scalar_errors()
        for index in range(len(self.tiers)):
            estimate = columns[index]
            found = self._decoded_forms(index, exact)
            expected = estimate[sample].sum().clamp_min(1e-300)
            cost = torch.zeros(V, dtype=torch.float64)
            for form, values in zip(self.forms, found, strict=True):
                cost += form.weights * (values[: len(sample)].sum() / expected) * estimate
            columns[index] = cost.index_copy_(0, measured, self._weighted(measured, found))
        return columns

    def _cosines(self, index: int, ids: Tensor) -> Tensor:
        rows, norms = self.rows.take(ids), self.norms[ids]
        y = self.decoded(index, Values(self, rows).of(self.tiers[index]))
        return torch.where(norms > 0, row_cosines(rows, y), 1.0).double()

    def _scalar_errors(self) -> Tensor:
        """Return the squared errors (T, V) float64 of scalar codes, each in the geometry of its tier."""
        errors = torch.zeros(len(self.tiers), len(self.rows), dtype=torch.float64)
        for place, rows in self.rows.blocks():
            values, squares = Values(self, rows), dict[bool, Tensor]()
            for index, (codes, tier) in enumerate(zip(self.codes, self.tiers, strict=True)):
                own = values.of(tier)
                if tier.transform not in squares:
                    squares[tier.transform] = codes.squared_norms(own)
                projections = codes.scalar_projections(tier, own).double()
                # Negative only by rounding.
                errors[index, place] = (squares[tier.transform] - projections.square()).clamp_min(0)
        return self.rows.world.merge(errors)

    def _decoded_forms(self, index: int, values: Values) -> list[Tensor]:
        """Return every form's values (n,) of rows at a tier as decoded."""
        y = self.decoded(index, values.of(self.tiers[index]))
        return [form.of(values.rows - y) for form in self.forms]

    def _weighted(self, ids: Tensor, values: list[Tensor]) -> Tensor:
        """Return the costs (n,) of rows whose forms have these values."""
        parts = [form.weights[ids] * each for form, each in zip(self.forms, values, strict=True)]
        return torch.stack(parts).sum(0)

    def _fit_weights(self, ids: Tensor) -> Tensor:
        return self.weights[ids]

    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        seen = y @ self.metric.float()
        return (x * seen).sum(1) / (y * seen).sum(1).clamp_min(1e-30)

    def _cost(self, ids: Tensor, x: Tensor, y: Tensor) -> float:
        return float(self._weighted(ids, [form.of(x - y) for form in self.forms]).sum())
