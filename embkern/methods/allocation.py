"""What rate allocation works on: the rows of a table, the tiers they can be stored at, and the packed table.

``Allocation`` is what every objective shares. ``DirectionAllocation`` has the objective of ``allocate``
without a calibration, and ``metric_allocation`` that with one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.packed_codes import GROUP, packed_levels
from ..ops.packed_format import Tier, lay_out, packed_bytes
from ..tables.packed import PackedTable, pack
from .quantizer_levels import UNIFORM_STEPS
from .row_codes import RowCodes, profiles
from .table_rows import TableRows

ROW_BITS = (8, 6, 4, 3, 2, 1)
SAMPLED_ROWS = 512  # on which the error of trellis codes is measured against that of scalar codes
COMPARED_ROWS = 256  # at a time


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
        rows: the rows, which are read a block at a time.
        weights: (V,) float64, weights of the rows with a sum of 1, which a subclass sets first.
        tiers: the tiers of values, and those of coefficients if there is a basis.
        codes: what quantises at each tier.
        basis: (K, H) float32, or None without coefficients.
        dtype: of the scales and the basis as stored.
    """

    weights: Tensor
    most_bits = 2  # of coefficients, on average over all groups
    also_without_basis = False  # whether the tiers of values are to be searched by themselves as well

    def __init__(self, rows: TableRows, dtype: torch.dtype, basis_groups: int) -> None:
        self.rows, self.dtype, self.norms = rows, dtype, rows.norms
        self.tiers = [Tier(False, (bits,) * groups_of(rows.width)) for bits in ROW_BITS]
        self.codes = [RowCodes(None)] * len(ROW_BITS)
        self.analysis: Tensor | None = None
        self.basis: Tensor | None = None
        if basis_groups:
            basis = self._find_basis(GROUP * basis_groups)
            basis = rows.world.on_first(lambda: basis)  # processors of other kinds may round differently
            self.analysis = basis.analysis
            self.inverse = torch.where(basis.spread > basis.spread.max() * 1e-4, 1 / basis.spread, 0.0)
            found = profiles(basis.spread, self.most_bits)
            self.tiers += found
            self.codes += [RowCodes(basis.spread)] * len(found)
            self.basis = basis.synthesis

    @abstractmethod
    def _find_basis(self, size: int) -> Basis:
        """Return a basis of ``size`` rows for the rows of the table that are read less often."""

    @abstractmethod
    def costs(self) -> Tensor:
        """Return what the error of every row at every tier costs, (T, V) float64, estimated."""

    def cosines(self, index: int, ids: Tensor) -> Tensor:
        """Return the cosines (n,) float64 of rows with what is decoded at a tier; 1 for rows of zeros."""
        parts = [self._cosines(index, part) for part in ids.split(self.rows.block_rows) if len(part)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @abstractmethod
    def _cosines(self, index: int, ids: Tensor) -> Tensor:
        """Return ``cosines`` of the rows of a block."""

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
        every = packed_bytes(rows, tiers, self.dtype.itemsize, _basis_rows(tiers), self.rows.width)
        return every - records

    def packed(self, kept: list[int], choice: Tensor) -> PackedTable:
        """Pack the rows, each at its choice (V,) among the tiers with indices ``kept``.

        A process packs the rows of its blocks; the records of the others are zeros until they are merged.
        """
        tiers, scales = [self.tiers[index] for index in kept], torch.zeros(len(self.rows))

        def parts() -> Iterator[tuple[int, Tensor, Tensor]]:
            for place, rows in self.rows.blocks():
                values = Values(self, rows)
                for position, index in enumerate(kept):
                    chosen = torch.nonzero(choice[place] == position).flatten()
                    if len(chosen):
                        ids, tier = place.start + chosen, self.tiers[index]
                        codes, found, _ = self.codes[index].encode(tier, values.of(tier)[chosen])
                        scales[ids] = found
                        yield position, ids, codes

        laid_out, merge = lay_out(choice, parts(), tiers), self.rows.world.merge
        merge(laid_out[0])
        merge(scales)
        levels, width = packed_levels().clone(), self.rows.width  # a copy, so that tables share no memory
        return PackedTable(*laid_out, levels, scales.to(self.dtype), self._stored_basis(tiers), None, width)

    def encoded(self, index: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``RowCodes.encode`` of values (n, K) that all processes have, each of which encodes some."""
        world, tier = self.rows.world, self.tiers[index]
        bounds = [len(values) * rank // world.size for rank in (world.rank, world.rank + 1)]
        own = self.codes[index].encode(tier, values[slice(*bounds)])
        codes, scales, projections = (
            world.merge(F.pad(each, (*[0, 0] * (each.dim() - 1), bounds[0], len(values) - bounds[1])))
            for each in own
        )
        return codes, scales, projections

    def decoded(self, index: int, values: Tensor) -> Tensor:
        """Return the rows (n, H) float32 that values (n, K) at a tier decode to."""
        tier = self.tiers[index]
        codes, scales, _ = self.encoded(index, values)
        tier_of, basis = torch.zeros(len(values), dtype=torch.int64), self._stored_basis([tier])
        scales, width = scales.to(self.dtype), self.rows.width
        table = pack(tier_of, {0: codes}, [tier], packed_levels(), scales, basis, None, width, check=False)
        return table.to_dense().float()

    def _stored_basis(self, tiers: list[Tier]) -> Tensor | None:
        """Return the rows of the basis that tiers use, as stored."""
        size = _basis_rows(tiers)
        return None if self.basis is None or not size else self.basis[:size].to(self.dtype).contiguous()

    def _moment_of_directions(self) -> Tensor:
        """Return the weighted mean (H, H) float64 of ``x x^T`` over the directions x of infrequent rows."""
        width = self.rows.width
        weights = torch.where(read_often(self.weights), 0.0, self.weights).sqrt().float()

        def moment(place: slice, rows: Tensor) -> Iterator[Tensor]:
            norms = self.norms[place]
            directions = rows / torch.where(norms > 0, norms, 1.0).unsqueeze(1)
            directions *= weights[place].unsqueeze(1)
            yield directions.t() @ directions

        moments = (moment(*block) for block in self.rows.blocks())
        total = self.rows.world.sum_blocks(moments, self.rows.block_count, width * width)
        return total.div_(weights.double().square().sum()).view(width, width)

    def refitted(self, packed: PackedTable, floor: float | None) -> PackedTable:
        """Fit the basis to the codes by least squares, and the scales to the rows' projections.

        Coarse codes have less error with another basis than the one that they were made for. The given table
        is returned unless the fit lowers the cost and respects the floor. This is the last step: the
        allocation no longer has its own basis.
        """
        if packed.basis is None:
            return packed
        self.analysis = self.basis = None  # 33 MB at H = 2048
        in_basis = packed.tiers[packed.tier_of_rows(), 0].bool() & (self.norms > 0)
        fitted = torch.nonzero(in_basis).flatten()
        parts = [ids for ids in fitted.split(self.rows.block_rows) if len(ids)]
        wide, world = packed.to(torch.float32), self.rows.world
        before = wide.basis
        assert before is not None, "a copy of that of the packed table"
        basis = self._best_basis(wide, parts)
        basis = world.on_first(lambda: basis)
        after = basis.float()
        factors, gains = torch.zeros(len(self.rows)), torch.zeros(len(parts), dtype=torch.float64)
        worst = 1.0

        def refit(ids: Tensor) -> tuple[float, float]:
            """Set the factors of rows; return by how much their cost falls, and their worst cosine."""
            x, values = self.rows.take(ids), wide.coefficients(ids)
            y = values @ after
            factors[ids], cost = self._projected(x, y), self._cost(ids, x, y)
            least = 1.0 if floor is None else float(row_cosines(x, y).min())
            del y
            return self._cost(ids, x, values @ before) - cost, least

        for part in world.own_blocks(len(parts)):
            gains[part], least = refit(parts[part])
            worst = min(worst, least)
        world.merge(factors)
        if world.merge(gains).sum() <= 0 or min(world.gather(worst)) < (floor or -1):
            return packed
        scales = packed.scales.clone()
        scales[fitted] = (packed.scales[fitted].float() * factors[fitted]).to(self.dtype)
        return dataclasses.replace(packed, basis=basis, scales=scales)

    def _best_basis(self, packed: PackedTable, parts: list[Tensor]) -> Tensor:
        """Fit the basis (K, H) of a table to the rows by weighted least squares, given their coefficients."""
        assert packed.basis is not None, "rows without a basis have no coefficients"
        size, world = len(packed.basis), self.rows.world

        def sums(ids: Tensor) -> Iterator[Tensor]:
            values = packed.coefficients(ids)
            weighted = (values * self._fit_weights(ids).float().unsqueeze(1)).t()
            yield weighted @ values
            del values
            yield weighted @ self.rows.take(ids)

        shapes = (size, size), (size, self.rows.width)
        found = (sums(parts[part]) for part in world.own_blocks(len(parts)))
        total = world.sum_blocks(found, len(parts), sum(map(math.prod, shapes)))
        gram, moment = (
            each.view(shape)
            for each, shape in zip(total.split([*map(math.prod, shapes)]), shapes, strict=True)
        )
        # A coefficient that no row uses gets a row of zeros in the basis.
        diagonal = gram.diagonal()
        diagonal += torch.where(diagonal > 0, 1e-6 * diagonal.mean(), 1.0)
        return torch.linalg.solve(gram, moment).to(self.dtype).contiguous()


class DirectionAllocation(Allocation):
    """Weighs every direction of a row alike: a row costs ``weight * (1 - cos)``."""

    def __init__(self, rows: TableRows, weights: Tensor, dtype: torch.dtype, basis_groups: int) -> None:
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
        """Estimate the costs from scalar codes, which some rows turn into those of trellis codes."""
        errors = torch.zeros(len(self.tiers), len(self.rows), dtype=torch.float64)
        some = torch.arange(0, len(self.rows), max(1, len(self.rows) // SAMPLED_ROWS))
        samples, own = Values.empty(self, len(some)), torch.zeros(len(some), dtype=torch.bool)
        for place, rows in self.rows.blocks():
            values, norms = Values(self, rows), self.norms[place]
            sampled = (some >= place.start) & (some < place.stop)
            samples.copy(sampled, values, some[sampled] - place.start)
            own |= sampled
            for index, (codes, tier) in enumerate(zip(self.codes, self.tiers, strict=True)):
                found = codes.scalar_projections(tier, values.of(tier))
                errors[index, place] = _error(found, norms).double()
        self.rows.world.merge(errors)
        exact = self._trellis_errors(samples, some, own)
        return self._corrected(errors, some, exact).clamp_min_(0).mul_(self.weights)

    def _cosines(self, index: int, ids: Tensor) -> Tensor:
        tier = self.tiers[index]
        own = Values(self, self.rows.take(ids)).of(tier)
        return 1 - _error(self.encoded(index, own)[2], self.norms[ids]).double()

    def _trellis_errors(self, samples: Values, some: Tensor, own: Tensor) -> Tensor:
        """Return the errors (T, n) of trellis codes of the rows ``some``, of which a process has its own."""
        errors = torch.zeros(len(self.tiers), len(some))
        for index, (codes, tier) in enumerate(zip(self.codes, self.tiers, strict=True)):
            if own.any():
                values = samples.of(tier)[own]
                errors[index, own] = _error(codes.encode(tier, values)[2], self.norms[some[own]])
        return self.rows.world.merge(errors)

    def _corrected(self, errors: Tensor, some: Tensor, exact: Tensor) -> Tensor:
        """Turn errors (T, V) of scalar codes into those of trellis codes, given those of rows ``some``."""
        for index in range(len(self.tiers)):
            found, scalar = exact[index].mean(), errors[index].float()
            expected = scalar[some].mean()
            # Where trellis codes are worse, their difference is added: rows of signs have a scalar error of
            # 0.
            better = scalar * (found / expected) if found < expected else scalar + (found - expected)
            errors[index] = better.double()
        return errors

    def _fit_weights(self, ids: Tensor) -> Tensor:
        return self.weights[ids] / self.norms[ids].double().square()

    def _projected(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(1) / y.square().sum(1).clamp_min(1e-30)

    def _cost(self, ids: Tensor, x: Tensor, y: Tensor) -> float:
        return -float((self.weights[ids] * row_cosines(x, y).double()).sum())


def _error(projections: Tensor, norms: Tensor) -> Tensor:
    """Return 1 - cos (n,) of rows of these norms and projections."""
    return torch.where(norms > 0, 1 - projections / norms, 0.0).clamp_min(0)  # negative only by rounding


class Values:
    """A block of rows, as values and as coefficients of an allocation's basis, each made when it is used."""

    def __init__(self, allocation: Allocation, rows: Tensor) -> None:
        self.allocation, self.rows = allocation, rows

    def of(self, tier: Tier) -> Tensor:
        """Return what a tier quantises, (n, 32 G)."""
        return self.coefficients if tier.transform else self.padded

    @classmethod
    def empty(cls, allocation: Allocation, count: int) -> Values:
        """Return values of rows that are to be copied, before their padded ones are used."""
        found = cls(allocation, torch.zeros(count, allocation.rows.width))
        if allocation.analysis is not None:
            found.coefficients = torch.zeros(count, allocation.analysis.shape[1])
        return found

    def copy(self, place: Tensor, other: Values, chosen: Tensor) -> None:
        """Copy chosen rows of a block to a place, with the coefficients that they have in the block."""
        self.rows[place] = other.rows[chosen]
        if self.allocation.analysis is not None:
            self.coefficients[place] = other.coefficients[chosen]

    @functools.cached_property
    def padded(self) -> Tensor:
        """The rows, (n, 32 G), padded with zeros where H is no multiple of 32."""
        width = self.rows.shape[1]
        return F.pad(self.rows, (0, -width % GROUP)) if width % GROUP else self.rows

    @functools.cached_property
    def coefficients(self) -> Tensor:
        """The coefficients of the rows over their spread, (n, K)."""
        assert self.allocation.analysis is not None, "tiers of coefficients have a basis"
        return (self.rows @ self.allocation.analysis).mul_(self.allocation.inverse)


def row_cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines (n,) of rows (n, H), some at a time: torch makes three copies of its arguments."""
    pairs = zip(x.split(COMPARED_ROWS), y.split(COMPARED_ROWS), strict=True)
    return torch.cat([F.cosine_similarity(*pair, eps=1e-30) for pair in pairs])


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


def float_dtype(rows: TableRows) -> torch.dtype:
    """Return the narrowest dtype that holds the scales of the rows of a table."""
    if rows.table.dtype == torch.bfloat16:
        return torch.bfloat16
    if rows.exponents is not None:  # by which the scales are multiplied
        return torch.float32
    norms, fp16 = rows.norms, torch.finfo(torch.float16)
    present = norms[norms > 0]
    steps = math.sqrt(rows.width) / UNIFORM_STEPS[8]  # norm of a row of the smallest steps
    fits = len(present) == 0 or (
        float(present.min()) / steps > fp16.tiny and float(present.max()) < fp16.max / 8
    )
    return torch.float16 if fits else torch.float32
