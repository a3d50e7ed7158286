"""What rate allocation works on: the rows of a table, the tiers they can be stored at, and the packed table.

``Allocation`` is what every objective shares. ``DirectionAllocation`` has the objective of ``allocate``
without a calibration, and ``metric_allocation`` that with one.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.packed_format import GROUP, Tier, packed_bytes, trellis_levels
from ..tables.packed import PackedTable, pack
from .quantizer_levels import UNIFORM_STEPS
from .row_codes import BLOCK_ROWS, RowCodes, profiles

ROW_BITS = (8, 6, 4, 3, 2, 1)
SAMPLED_ROWS = 512  # on which the error of trellis codes is measured against that of scalar codes


@dataclasses.dataclass
class Basis:
    """A basis of rows: ``coefficients = rows @ analysis / spread``, ``rows = coefficients @ synthesis``.

    Attributes:
        analysis: (H, K), K a multiple of 32.
        spread: (K,), standard deviations of ``rows @ analysis``.
        synthesis: (K, H), the basis that is stored, times the spread.
    """

    analysis: Tensor
    spread: Tensor
    synthesis: Tensor


class Allocation(ABC):
    """The rows of a table and the tiers at which they can be stored.

    Attributes:
        weights: (V,) float64, weights of the rows with a sum of 1, which a subclass sets first.
        tiers: the tiers of values, and those of coefficients if there is a basis.
        basis: (K, H) float32, or None without coefficients.
        dtype: of the scales and the basis as stored.
    """

    weights: Tensor
    most_bits = 2  # of coefficients, on average over all groups

    def __init__(self, rows: Tensor, dtype: torch.dtype, basis_groups: int) -> None:
        self.rows, self.dtype = rows, dtype
        self.norms = torch.linalg.vector_norm(rows, dim=1)
        groups = groups_of(rows.shape[1])
        plain = RowCodes(F.pad(rows, (0, groups * GROUP - rows.shape[1])), None)
        self.tiers = [Tier(False, (bits,) * groups) for bits in ROW_BITS]
        self.codes = [plain for _ in ROW_BITS]
        self.basis: Tensor | None = None
        if basis_groups:
            basis = self._find_basis(GROUP * basis_groups)
            inverse = torch.where(basis.spread > basis.spread.max() * 1e-4, 1 / basis.spread, 0.0)
            coefficients = torch.cat([part @ basis.analysis for part in rows.split(BLOCK_ROWS)]) * inverse
            found = profiles(basis.spread, self.most_bits)
            self.tiers += found
            self.codes += [RowCodes(coefficients, basis.spread)] * len(found)
            self.basis = basis.synthesis

    @abstractmethod
    def _find_basis(self, size: int) -> Basis:
        """Return a basis of ``size`` rows for the rows of the table that are read less often."""

    @abstractmethod
    def costs(self) -> Tensor:
        """Return what the error of every row at every tier costs, (V, T) float64, estimated."""

    @abstractmethod
    def costs_and_cosines(self) -> tuple[Tensor, Tensor]:
        """Return these costs as measured, and the cosines (V, T) of the rows with what is decoded."""

    @abstractmethod
    def _fit_weights(self, ids: Tensor) -> Tensor:
        """Return the weights (n,) of the squared errors of rows in the fit of the basis."""

    @abstractmethod
    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the factors (n,) by which decoded rows y are best multiplied."""

    @abstractmethod
    def _cost(self, ids: Tensor, x: Tensor, y: Tensor) -> float:
        """Return what decoded rows y in place of rows x cost."""

    def shared_bytes(self, tiers: list[Tier]) -> int:
        """Return the bytes of a table with these tiers, except its records."""
        rows = torch.zeros(len(tiers), dtype=torch.int64)
        rows[0] = len(self.rows)
        records = 4 * len(self.rows) * tiers[0].words
        every = packed_bytes(rows, tiers, self.dtype.itemsize, _basis_rows(tiers), self.rows.shape[1])
        return every - records

    def packed(self, kept: list[int], choice: Tensor, ids: Tensor | None = None) -> PackedTable:
        """Pack rows, by default all, each at its choice (n,) among the tiers with indices ``kept``.

        A table of some rows serves to measure them, and is not validated.
        """
        whole = ids is None
        ids = torch.arange(len(self.rows)) if ids is None else ids
        tiers = [self.tiers[index] for index in kept]
        codes, scales = {}, torch.zeros(len(ids))
        for place, index in enumerate(kept):
            chosen = torch.nonzero(choice == place).flatten()
            codes[place], scales[chosen], _ = self.codes[index].encode(self.tiers[index], ids[chosen])
        basis = None
        if self.basis is not None and (size := _basis_rows(tiers)):
            basis = self.basis[:size].to(self.dtype)
        levels, width = trellis_levels().clone(), self.rows.shape[1]  # a copy, so that tables share no memory
        return pack(choice, codes, tiers, levels, scales.to(self.dtype), basis, None, width, check=whole)

    def _moment_of_directions(self) -> Tensor:
        """Return the weighted mean (H, H) float64 of ``x x^T`` over the directions x of infrequent rows."""
        width = self.rows.shape[1]
        weights = torch.where(read_often(self.weights), 0.0, self.weights).sqrt().float()
        directions = self.rows / torch.where(self.norms > 0, self.norms, 1.0).unsqueeze(1)
        total = torch.zeros(width, width, dtype=torch.float64)
        for part, weight in zip(directions.split(BLOCK_ROWS), weights.split(BLOCK_ROWS), strict=True):
            weighted = part * weight.unsqueeze(1)
            total += (weighted.t() @ weighted).double()
        return total / weights.double().square().sum()

    def refitted(self, packed: PackedTable, floor: float | None) -> PackedTable:
        """Fit the basis to the codes by least squares, and the scales to the rows' projections.

        Coarse codes have less error with another basis than the one that they were made for. The given table
        is returned unless the fit lowers the cost and respects the floor.
        """
        if packed.basis is None:
            return packed
        in_basis = packed.tiers[packed.tier_of_rows(), 0].bool() & (self.norms > 0)
        parts = [ids for ids in torch.nonzero(in_basis).flatten().split(BLOCK_ROWS) if len(ids)]
        wide = packed.to(torch.float32)
        basis = self._best_basis(wide, parts)
        scales, gained, worst = packed.scales.clone(), 0.0, 1.0
        for ids in parts:
            x, values = self.rows[ids], wide.coefficients(ids)
            y = values @ basis.float()
            scales[ids] = (packed.scales[ids].float() * self._projected(x, y)).to(self.dtype)
            gained += self._cost(ids, x, values @ packed.basis.float()) - self._cost(ids, x, y)
            worst = min(worst, float(F.cosine_similarity(x, y, eps=1e-30).min()))
        if gained <= 0 or worst < (floor or -1):
            return packed
        return dataclasses.replace(packed, basis=basis, scales=scales)

    def _best_basis(self, packed: PackedTable, parts: list[Tensor]) -> Tensor:
        """Fit the basis (K, H) of a table to the rows by weighted least squares, given their coefficients."""
        assert packed.basis is not None, "rows without a basis have no coefficients"
        size = len(packed.basis)
        gram = torch.zeros(size, size, dtype=torch.float64)
        moment = torch.zeros(size, self.rows.shape[1], dtype=torch.float64)
        for ids in parts:
            values = packed.coefficients(ids)
            weighted = (values * self._fit_weights(ids).float().unsqueeze(1)).t()
            gram += (weighted @ values).double()
            moment += (weighted @ self.rows[ids]).double()
        # A coefficient that no row uses gets a row of zeros in the basis.
        diagonal = gram.diagonal()
        ridge = torch.where(diagonal > 0, 1e-6 * diagonal.mean(), 1.0)
        return torch.linalg.solve(gram + torch.diag(ridge), moment).to(self.dtype).contiguous()


class DirectionAllocation(Allocation):
    """Weighs every direction of a row alike: a row costs ``weight * (1 - cos)``."""

    def __init__(self, rows: Tensor, weights: Tensor, dtype: torch.dtype, basis_groups: int) -> None:
        self.weights = weights
        super().__init__(rows, dtype, basis_groups)

    def _find_basis(self, size: int) -> Basis:
        """Return principal axes of the directions of infrequent rows."""
        values, vectors = torch.linalg.eigh(self._moment_of_directions())
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size].float()
        spread = values.sqrt().float()
        vectors = F.pad(vectors, (0, size - vectors.shape[1]))
        spread = F.pad(spread, (0, size - len(spread)))
        return Basis(vectors, spread, vectors.t() * spread.unsqueeze(1))

    def costs(self) -> Tensor:
        return self._weighted(self._errors(exact=False))

    def costs_and_cosines(self) -> tuple[Tensor, Tensor]:
        errors = self._errors(exact=True)
        return self._weighted(errors), 1 - errors

    def _weighted(self, errors: Tensor) -> Tensor:
        return errors.clamp_min(0) * self.weights.unsqueeze(1)

    def _errors(self, exact: bool) -> Tensor:
        """Return 1 - cos (V, T) float64 of every row at every tier."""
        errors, every = [], torch.arange(len(self.rows))
        for codes, tier in zip(self.codes, self.tiers, strict=True):
            if exact:
                errors.append(self._error(codes.encode(tier, every)[2], every))
                continue
            scalar = self._error(codes.scalar_projections(tier, every), every)
            some = torch.arange(0, len(scalar), max(1, len(scalar) // SAMPLED_ROWS))
            found, expected = self._error(codes.encode(tier, some)[2], some).mean(), scalar[some].mean()
            # Where trellis codes are worse, their difference is added: rows of signs have a scalar error of
            # 0.
            errors.append(scalar * (found / expected) if found < expected else scalar + (found - expected))
        return torch.stack(errors, 1).double()

    def _error(self, projections: Tensor, ids: Tensor) -> Tensor:
        norms = self.norms[ids]
        return torch.where(norms > 0, 1 - projections / norms, 0.0).clamp_min(0)  # negative only by rounding

    def _fit_weights(self, ids: Tensor) -> Tensor:
        return self.weights[ids] / self.norms[ids].double().square()

    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(1) / y.square().sum(1).clamp_min(1e-30)

    def _cost(self, ids: Tensor, x: Tensor, y: Tensor) -> float:
        return -float((self.weights[ids] * F.cosine_similarity(x, y, eps=1e-30).double()).sum())


def read_often(weights: Tensor) -> Tensor:
    """Return which rows (V,) have half of the weight; they will be stored as values."""
    often = torch.zeros_like(weights, dtype=torch.bool)
    order = weights.argsort(descending=True, stable=True)
    often[order] = weights[order].cumsum(0) < 0.5 * weights.sum()
    return often


def _basis_rows(tiers: list[Tier]) -> int:
    """Return the number of rows K of the basis that these tiers use."""
    return GROUP * max((len(tier.bits) for tier in tiers if tier.transform), default=0)


def groups_of(width: int) -> int:
    """Return the number of groups of 32 that hold ``width`` values."""
    return -(-width // GROUP)


def float_dtype(rows: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that holds the scales of these rows (V, H) of a table of ``dtype``."""
    if dtype == torch.bfloat16:
        return dtype
    norms, fp16 = torch.linalg.vector_norm(rows, dim=1), torch.finfo(torch.float16)
    present = norms[norms > 0]
    steps = math.sqrt(rows.shape[1]) / UNIFORM_STEPS[8]  # norm of a row of the smallest steps
    fits = len(present) == 0 or (
        float(present.min()) / steps > fp16.tiny and float(present.max()) < fp16.max / 8
    )
    return torch.float16 if fits else torch.float32
