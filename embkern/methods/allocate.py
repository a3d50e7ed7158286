"""Rate allocation: every row is quantised at its own rate, directly or in a basis that rows share.

The direction error of a row matters as often as its token is read. With the tokens' relative frequencies p
and weights ``w_i = p_i ** exponent``, the rates t_i solve::

    min over t of  sum_i w_i (1 - cos(x_i, y_i(t_i)))   with  sum_i bytes(t_i) + shared bytes <= budget

For a multiplier lambda every row is chosen independently, ``argmin_t w_i (1 - cos) + lambda bytes(t)``, and
bisection finds the lambda that spends the budget. This is reverse water-filling with rows in the place of
components: rare tokens get a few words of 32 bits, frequent ones 4 to 8 bits per value.

A row is stored at one of a few rates (tiers):

- its own values at 1 to 8 bits, for frequent rows; looking them up needs no matrix product;
- its coefficients in an orthonormal basis that all such rows share, at 0 to 4 bits per group of 32, assigned
  by the variances of the groups (again reverse water-filling). This is better at few bits, and the only way
  below 1 bit per value.

Codes of up to 4 bits are trellis codes: the level of a value depends on its own bits and those of the values
before it, and the best path through a group of 32 is searched. From 2 bits on their error is a third below
that of Lloyd-Max levels, which corresponds to a quarter of a bit per value.

Every row has a scale. It is searched so that the direction of the quantised row is the best, and stored so
that the row has the length of its projection.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..ops.packed_format import (
    GROUP,
    LEVEL_BITS,
    LEVEL_STEP,
    Tier,
    packed_bytes,
    packed_values,
    trellis_levels,
)
from ..ops.quantize_rows import quantize_rows
from ..ops.quantize_trellis import quantize_trellis
from ..tables.packed import PackedTable, pack
from .base import (
    Options,
    Rows,
    blocks,
    byte_budget,
    check_table,
    parse_options,
    ratio_error,
    row_weights,
)
from .quantizer_levels import TRELLIS_DISTORTION, UNIFORM_STEPS, lloyd_max_levels
from .rate_search import RateSearch

ROW_BITS = (8, 6, 4, 3, 2, 1)
COEFFICIENT_BITS = LEVEL_BITS
# Candidate rates of coefficients in words per row; those above two words per group are not used.
RATES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
BASIS_SHARE = 0.05  # of the budget, for the basis of the coefficients
# Scales that are tried for a row, relative to its root mean square: few to compare tiers, more for the final
# codes. The large ones are for rows with outliers, which are common among frequent tokens: the full stop of
# all-MiniLM-L6-v2 has a value of 14.6 times the root mean square.
COARSE_SCALES = (0.9, 1.0, 1.15, 1.5, 2.0, 2.8, 4.0)
FINE_SCALES = (
    *(0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.22, 1.3, 1.4),
    *(1.5, 1.75, 2.0, 2.4, 2.8, 3.4, 4.0, 5.0, 6.5),
)
TRELLIS_SCALES = (0.95, 1.0, 1.06)  # tried for trellis codes, relative to the best of FINE_SCALES
SAMPLED_ROWS = 512  # on which the error of trellis codes is measured against that of scalar codes
BLOCK_ROWS = 4096  # rows that are quantised at a time


class AllocateOptions(Options):
    """Options of ``allocate``."""

    exponent: float = Field(0.55, ge=0, le=1, description="rows weigh their frequency to this power")
    tiers: int = Field(6, ge=1, le=16, description="rates that rows may choose from")
    floor: float | None = Field(None, gt=0, lt=1, description="least cosine of any row with the original")


@torch.no_grad()
def allocate(table: Rows, *, ratio: float, counts: Tensor | None = None, **options: Any) -> PackedTable:
    """Quantise every row at its own rate so that the weighted direction error is least for the ratio.

    The objective is ``(w * (1 - F.cosine_similarity(x, y))).sum()`` with ``w = counts ** exponent``.

    Args:
        table: (V, H), in memory or a ``TableFile``.
        ratio: bytes of the table as stored over bytes of everything that replaces it.
        counts: (V,), how often each token is read, absolute or relative; None weighs all rows equally.
        options: the fields of ``AllocateOptions``.

    Returns:
        A packed table on the CPU with fp16 scales and basis (bf16 for a bf16 table, fp32 where the range of
        fp16 does not suffice).

    Raises:
        ValueError, TypeError: the ratio cannot be reached, with the floor if one is given (the message names
            the highest that can), or an argument is not usable.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3); Lagrangian
    allocation after Shoham and Gersho (1988); trellis codes: Marcellin and Fischer (1990).
    """
    chosen = parse_options(AllocateOptions, options, "allocate")
    check_table(table)
    budget = byte_budget(table, ratio)
    weights = row_weights(counts, len(table), chosen.exponent)
    rows = torch.cat([each.to("cpu", torch.float32) for each in blocks(table)])
    allocation = _Allocation(rows, weights, table.dtype, budget)
    search = RateSearch(
        allocation.direction_errors(exact=chosen.floor is not None),
        weights,
        allocation.tiers,
        allocation.shared_bytes,
        chosen.floor,
    )
    found = search.within(budget, chosen.tiers)
    if found is None:
        condition = "" if chosen.floor is None else f" with floor {chosen.floor:g}"
        raise ratio_error(table, ratio, search.least_bytes(), condition)
    return allocation.refitted(allocation.packed(*found), chosen.floor)


@functools.cache
def scalar_levels() -> Tensor:
    """Return Lloyd-Max levels (4, 16) int16 of 1 to 4 bits in units of 2^-12, used to compare tiers."""
    levels = torch.zeros(LEVEL_BITS, 16, dtype=torch.int16)
    for bits in range(1, LEVEL_BITS + 1):
        levels[bits - 1, : 2**bits] = (lloyd_max_levels(bits) / LEVEL_STEP).round()
    return levels


@functools.cache
def uniform_steps() -> Tensor:
    """Return the steps (9,) fp32 of uniform codes of 0 to 8 bits; 1 for bits whose codes have levels."""
    return torch.tensor([UNIFORM_STEPS.get(bits, 1.0) for bits in range(9)], dtype=torch.float32)


class _Allocation:
    """The rows of a table and the tiers at which they can be stored.

    Attributes:
        tiers: the tiers of values, and those of coefficients if the budget allows a basis.
    """

    def __init__(self, rows: Tensor, weights: Tensor, dtype: torch.dtype, budget: int) -> None:
        self.rows, self.weights = rows, weights
        self.norms = torch.linalg.vector_norm(rows, dim=1)
        self.dtype = _float_dtype(self.norms, rows.shape[1], dtype)
        groups = -(-rows.shape[1] // GROUP)
        plain = _Space(F.pad(rows, (0, groups * GROUP - rows.shape[1])), None, self.norms)
        self.tiers = [Tier(False, (bits,) * groups) for bits in ROW_BITS]
        self._spaces = [plain for _ in ROW_BITS]
        self._basis: Tensor | None = None
        affordable = BASIS_SHARE * budget / GROUP / self.dtype.itemsize / rows.shape[1]
        if size := GROUP * min(groups, round(affordable)):
            vectors, spread = self._principal(size)
            inverse = torch.where(spread > spread.max() * 1e-4, 1 / spread, 0.0)
            coefficients = torch.cat([part @ vectors for part in rows.split(BLOCK_ROWS)]) * inverse
            profiles = _profiles(spread)
            self.tiers += profiles
            self._spaces += [_Space(coefficients, spread, self.norms) for _ in profiles]
            self._basis = vectors.t() * spread.unsqueeze(1)

    def _principal(self, size: int) -> tuple[Tensor, Tensor]:
        """Return principal axes (H, K) of directions of infrequent rows, and the spread (K,) along them."""
        width = self.rows.shape[1]
        order = self.weights.argsort(descending=True, stable=True)
        read_often = torch.zeros_like(self.weights, dtype=torch.bool)
        read_often[order] = self.weights[order].cumsum(0) < 0.5  # will be stored as values
        weights = torch.where(read_often, 0.0, self.weights).sqrt().float()
        directions = self.rows / torch.where(self.norms > 0, self.norms, 1.0).unsqueeze(1)
        total = torch.zeros(width, width, dtype=torch.float64)
        for part, weight in zip(directions.split(BLOCK_ROWS), weights.split(BLOCK_ROWS), strict=True):
            weighted = part * weight.unsqueeze(1)
            total += (weighted.t() @ weighted).double()
        values, vectors = torch.linalg.eigh(total)
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size].float()
        spread = (values / weights.double().square().sum()).sqrt().float()
        return F.pad(vectors, (0, size - vectors.shape[1])), F.pad(spread, (0, size - len(spread)))

    def direction_errors(self, exact: bool) -> Tensor:
        """Return 1 - cos (V, T) float64 of every row at every tier, estimated unless ``exact``."""
        errors = []
        for space, tier in zip(self._spaces, self.tiers, strict=True):
            if exact:
                errors.append(space.direction_error(tier))
                continue
            scalar = space.scalar_error(tier)
            some = torch.arange(0, len(scalar), max(1, len(scalar) // SAMPLED_ROWS))
            found, expected = space.direction_error(tier, some).mean(), scalar[some].mean()
            # Where trellis codes are worse, their difference is added: rows of signs have a scalar error of
            # 0.
            errors.append(scalar * (found / expected) if found < expected else scalar + (found - expected))
        return torch.stack(errors, 1).double()

    def shared_bytes(self, tiers: list[Tier]) -> int:
        """Return the bytes of a table with these tiers, except its records."""
        rows = torch.zeros(len(tiers), dtype=torch.int64)
        rows[0] = len(self.rows)
        records = 4 * len(self.rows) * tiers[0].words
        every = packed_bytes(rows, tiers, self.dtype.itemsize, _basis_rows(tiers), self.rows.shape[1])
        return every - records

    def packed(self, kept: list[int], choice: Tensor) -> PackedTable:
        """Pack the table with every row at its choice (V,) among the tiers with indices ``kept``."""
        tiers = [self.tiers[index] for index in kept]
        codes, scales = {}, torch.zeros(len(self.rows))
        for place, index in enumerate(kept):
            ids = torch.nonzero(choice == place).flatten()
            codes[place], scales[ids], _ = self._spaces[index].encode(self.tiers[index], ids)
        basis = None
        if self._basis is not None and (size := _basis_rows(tiers)):
            basis = self._basis[:size].to(self.dtype)
        levels, width = trellis_levels().clone(), self.rows.shape[1]  # a copy, so that tables share no memory
        return pack(choice, codes, tiers, levels, scales.to(self.dtype), basis, None, width)

    def refitted(self, packed: PackedTable, floor: float | None) -> PackedTable:
        """Fit the basis to the codes by least squares, and the scales to the rows' projections.

        Coarse codes have less error with another basis than the one that they were made for. The given table
        is returned unless the fit lowers the weighted direction error and respects the floor.
        """
        if packed.basis is None:
            return packed
        in_basis = packed.tiers[packed.tier_of_rows(), 0].bool() & (self.norms > 0)
        parts = [ids for ids in torch.nonzero(in_basis).flatten().split(BLOCK_ROWS) if len(ids)]
        basis = self._best_basis(packed, parts, len(packed.basis))
        scales, gained, worst = packed.scales.clone(), 0.0, 1.0
        for ids in parts:
            x, values = self.rows[ids], _coefficients(packed, ids, len(basis))
            y = values @ basis.float()
            factor = (x * y).sum(1) / y.square().sum(1).clamp_min(1e-30)
            scales[ids] = (packed.scales[ids].float() * factor).to(self.dtype)
            before = F.cosine_similarity(x, values @ packed.basis.float(), eps=1e-30)
            after = F.cosine_similarity(x, y, eps=1e-30)
            gained += float((self.weights[ids] * (after - before).double()).sum())
            worst = min(worst, float(after.min()))
        if gained <= 0 or worst < (floor or -1):
            return packed
        return dataclasses.replace(packed, basis=basis, scales=scales)

    def _best_basis(self, packed: PackedTable, parts: list[Tensor], size: int) -> Tensor:
        """Fit the basis (K, H) to unit rows by weighted least squares, given their coefficients."""
        gram = torch.zeros(size, size, dtype=torch.float64)
        moment = torch.zeros(size, self.rows.shape[1], dtype=torch.float64)
        for ids in parts:
            values = _coefficients(packed, ids, size)
            weight = self.weights[ids] / self.norms[ids].double().square()
            weighted = (values * weight.float().unsqueeze(1)).t()
            gram += (weighted @ values).double()
            moment += (weighted @ self.rows[ids]).double()
        # A coefficient that no row uses gets a row of zeros in the basis.
        diagonal = gram.diagonal()
        ridge = torch.where(diagonal > 0, 1e-6 * diagonal.mean(), 1.0)
        return torch.linalg.solve(gram + torch.diag(ridge), moment).to(self.dtype).contiguous()


def _basis_rows(tiers: list[Tier]) -> int:
    """Return the number of rows K of the basis that these tiers use."""
    return GROUP * max((len(tier.bits) for tier in tiers if tier.transform), default=0)


def _coefficients(packed: PackedTable, ids: Tensor, size: int) -> Tensor:
    """Decode the coefficients (n, K) of rows, times the rows' scales."""
    values = packed_values(ids, packed.records, packed.directory, packed.tiers, packed.levels)[1][:, :size]
    return F.pad(values, (0, size - values.shape[1])) * packed.scales[ids].float().unsqueeze(1)


def _float_dtype(norms: Tensor, width: int, dtype: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that holds the scales of rows with these norms."""
    if dtype == torch.bfloat16:
        return dtype
    present, fp16 = norms[norms > 0], torch.finfo(torch.float16)
    steps = math.sqrt(width) / UNIFORM_STEPS[8]  # norm of a row of the smallest steps
    fits = len(present) == 0 or (
        float(present.min()) / steps > fp16.tiny and float(present.max()) < fp16.max / 8
    )
    return torch.float16 if fits else torch.float32


def _profiles(spread: Tensor) -> list[Tier]:
    """Return the tiers of coefficients; each further bit goes to the group whose error it lowers most."""
    groups = len(spread) // GROUP
    energy = spread.double().square().view(groups, GROUP).sum(1).tolist()
    bits, tiers = [0] * groups, []
    for words in range(1, COEFFICIENT_BITS * groups + 1):
        gains = [
            energy[g] * (TRELLIS_DISTORTION[b] - TRELLIS_DISTORTION[b + 1]) if b < COEFFICIENT_BITS else -1.0
            for g, b in enumerate(bits)
        ]
        bits[max(range(groups), key=gains.__getitem__)] += 1
        if words in RATES and words <= 2 * groups:
            used = max(g + 1 for g, b in enumerate(bits) if b)
            tiers.append(Tier(True, tuple(bits[:used])))
    return tiers


@dataclass
class _Space:
    """The values that a tier quantises: the rows, or their coefficients in the basis over their spread."""

    values: Tensor  # (V, width), padded with zeros
    spread: Tensor | None  # (width,), None for ones
    norms: Tensor  # (V,), norms of the rows

    def scalar_error(self, tier: Tier) -> Tensor:
        """Return 1 - cos (V,) of every row with scalar instead of trellis codes, in a tenth of the time."""
        parts = torch.arange(len(self.values)).split(BLOCK_ROWS)
        projections = [self._scalar(part, tier, COARSE_SCALES, False)[2] for part in parts]
        return self._error(torch.cat(projections), slice(None))

    def direction_error(self, tier: Tier, ids: Tensor | None = None) -> Tensor:
        """Return 1 - cos (n,) of rows, by default all, as ``encode`` quantises them."""
        ids = torch.arange(len(self.values)) if ids is None else ids
        return self._error(self.encode(tier, ids)[2], ids)

    def _error(self, projections: Tensor, ids: Tensor | slice) -> Tensor:
        norms = self.norms[ids]
        return torch.where(norms > 0, 1 - projections / norms, 0.0).clamp_min(0)  # negative only by rounding

    def encode(self, tier: Tier, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes (n, 32 * groups) uint8, scales (n,) and projections (n,) of rows."""
        parts = [self._encoded(part, tier) for part in ids.split(BLOCK_ROWS)]
        codes, scales, projections = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(scales), torch.cat(projections)

    def _encoded(self, ids: Tensor, tier: Tier) -> tuple[Tensor, Tensor, Tensor]:
        wide = max(tier.bits, default=0) > LEVEL_BITS
        assert not wide or min(tier.bits) > LEVEL_BITS, "a tier has either uniform or trellis codes"
        codes, scales, projections = self._scalar(ids, tier, FINE_SCALES, wide)
        if wide:
            return codes, scales, projections
        near = scales.unsqueeze(1) * torch.tensor(TRELLIS_SCALES)
        return quantize_trellis(*self._values(ids, tier), trellis_levels(), near, needs_codes=True)

    def _scalar(
        self, ids: Tensor, tier: Tier, factors: tuple[float, ...], needs_codes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        tried = torch.tensor(factors)
        return quantize_rows(
            *self._values(ids, tier), scalar_levels(), uniform_steps(), tried, needs_codes=needs_codes
        )

    def _values(self, ids: Tensor, tier: Tier) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the values of rows in the groups of a tier, their spread, and the bits of the groups."""
        width = GROUP * len(tier.bits)
        spread = None if self.spread is None else self.spread[:width]
        return self.values[ids, :width], spread, torch.tensor(tier.bits, dtype=torch.uint8)
