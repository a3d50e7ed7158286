"""Low-rank factors with the least direction error, and a bound on what any other basis could gain."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..tables.factors import Factors, check_rank
from .base import Options, Rows, check_shape, parse_options, row_weights, training_dtype
from .direction_solver import raise_not_finite, row_parts, solve_direction
from .sharded import Section, World


class DirectionOptions(Options):
    """Options of ``direction``."""

    cosine_weight: float = Field(1.0, ge=0, description="of 1 - cos(x, y)")
    mse_weight: float = Field(0.0, ge=0, description="of |x - y|^2, summed over a row's entries")
    exponent: float = Field(0.75, ge=0, description="rows weigh as their counts to this power")
    center: bool = Field(False, description="subtract the weighted mean row and keep it as the offset")
    tolerance: float = Field(1e-6, gt=0, description="stop when gap / objective is at most this")
    max_steps: int = Field(30, ge=1, description="steps at most")

    @model_validator(mode="after")
    def _check_that_a_weight_is_positive(self) -> DirectionOptions:
        if not self.cosine_weight and not self.mse_weight:
            raise ValueError("cosine_weight, mse_weight: expected one above 0, got two zeros")
        return self


def direction(
    table: Rows,
    rank: int,
    *,
    counts: Tensor | None = None,
    row_weight: Tensor | None = None,
    world: World | None = None,
    **options: Any,
) -> Factors:
    """Rank-r factors with the least weighted direction error, or squared error, or sum of both.

    The basis minimises, over all ``y = codes @ basis``::

        p = row_weight, or counts ** exponent, or ones;  p = p / p.sum()
        (p * (cosine_weight * (1 - F.cosine_similarity(x, y)) + mse_weight * (x - y).square().sum(1))).sum()

    ``y`` is the orthogonal projection of ``x``, which minimises both terms for a given basis. A row of zeros
    stays zero and counts as no error. With ``center`` the mean row, weighted by p, is subtracted from every x
    first; the objective and its bound are then those of the centred rows.

    ``cosine_weight=0, mse_weight=1`` is a weighted SVD; with ``row_weight=fisher_row_weights(...)`` it is
    FWSVD (arXiv 2207.00112).

    Args:
        table: (V, H), in memory or a ``TableFile``, which is read block by block and gives the same bits.
        rank: r, 1 to H.
        counts: (V,), how often each token is read; None weighs all rows equally.
        row_weight: (V,), weights of the rows in place of counts.
        world: the processes and shards of a distributed run, see ``embkern.methods.sharded``. Each process
            reads its own rows; a step gathers H x H values per shard.
        options: the fields of ``DirectionOptions``.

    Returns:
        Factors in the table's dtype, with the columns of the codes in order of decreasing eigenvalue of the
        gradient M. ``facts`` has objective, gap, steps and converged, see ``DirectionSolution``.

    Raises:
        ValueError, TypeError: the rank, an option or a weight is out of range, or the table is not usable.
    """
    chosen = parse_options(DirectionOptions, options, "direction")
    check_shape(table)
    check_rank(rank, table.shape[1])
    world = world or World()
    sections = world.sections(table)
    with torch.no_grad(), torch.autocast(table.device.type, enabled=False):
        weight = _normalised_weights(counts, row_weight, chosen.exponent, len(table)).to(table.device)
        offset = _weighted_mean(sections, weight, world) if chosen.center else None
        solution = solve_direction(
            table,
            rank,
            chosen.cosine_weight * weight,
            chosen.mse_weight * weight,
            offset=offset,
            tolerance=chosen.tolerance,
            max_steps=chosen.max_steps,
            world=world,
        )
        basis = solution.basis.to(training_dtype(table))
        with world.one_thread():
            codes = [_project(section, basis, offset, table.dtype) for section in sections]
        return Factors(
            world.gather_rows(codes),
            solution.basis.t().to(table.dtype).contiguous(),
            None if offset is None else offset.to(table.dtype),
            facts={name: getattr(solution, name) for name in ("objective", "gap", "steps", "converged")},
        )


def _normalised_weights(counts: Tensor | None, row_weight: Tensor | None, exponent: float, V: int) -> Tensor:
    """Return row weights (V,) float64 with a sum of 1."""
    if counts is not None and row_weight is not None:
        raise ValueError("counts, row_weight: expected at most one of them, got both")
    if row_weight is not None:
        return row_weights(row_weight, V, name="row_weight")
    return row_weights(counts, V, exponent)


def _weighted_mean(sections: list[Section], weight: Tensor, world: World) -> Tensor:
    """Return the weighted mean row (H,) float64, for weights with a sum of 1."""

    def section_sum(section: Section) -> Tensor:
        first, total = section.start, weight.new_zeros(section.rows.shape[1])
        for rows in row_parts(section.rows):
            total += weight[first : first + len(rows)] @ rows.double()
            first += len(rows)
        return total

    with world.one_thread():
        mean = world.sum(section_sum(section) for section in sections)
    if not bool(torch.isfinite(mean).all()):
        raise_not_finite(sections, world)
    return mean


def _project(section: Section, basis: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the codes (n, r) of a section's rows."""
    codes, first = torch.empty(len(section.rows), basis.shape[1], dtype=dtype, device=basis.device), 0
    for rows in row_parts(section.rows, offset):
        codes[first : first + len(rows)] = rows @ basis
        first += len(rows)
    return codes
