"""Direction: the subspace that loses least of every row's direction, with a bound on what is left to gain.

A decoder without bias reconstructs rows in the span of an orthonormal Q (H, r). There the projection
``y = Q Q^T x`` is at once the nearest to x and the one with the largest cosine, for every row. So with row
weights a, b >= 0::

    min over codes and basis of  sum_i a_i (1 - cos(x_i, y_i)) + b_i |x_i - y_i|^2
      =  sum_i a_i + b_i |x_i|^2  -  max over Q of F(Q Q^T),
    F(P) = sum_i a_i c_i + b_i |x_i|^2 c_i^2,    c_i^2 = x_i^T P x_i / |x_i|^2

F is concave in P, with the gradient ``M = sum_i w_i x_i x_i^T / |x_i|^2`` (H, H) at P, where
``w_i = a_i / (2 c_i) + b_i |x_i|^2``. So

- gap: the sum of the r largest eigenvalues of M less tr(M P) bounds what any other Q could gain;
- step: Q becomes the r leading eigenvectors of ``M + stiffness * Q Q^T``.

The plain eigenvectors of M go too far: a direction that enters pulls less than it promised, one that leaves
pulls more, and those that are nearly tied swap for ever. The second term charges for the distance gone, and
where it is of the size of F's own curvature a step is nearly one of Newton's: two or three of them do. Were F
to fall, the step is tried again with a larger term, which in the limit follows the gradient.

A step is two passes over the table, a Gram matrix and a projection. Products run by blocks in fp32 (float64
for a float64 table), sums over blocks and eigenvectors in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..tables.factors import Factors, check_rank
from .base import (
    Options,
    Rows,
    check_shape,
    checked_weights,
    not_finite,
    parse_options,
    refuse_rows,
    row_weights,
    training_dtype,
    wide_blocks,
)
from .sharded import Section, World

GRAM_ROWS = 2048  # rows of a product that is summed in the rows' own dtype
GRAM_TILES = 4  # column tiles of a Gram matrix, of which only the upper triangle is computed
PADDING = 8  # columns of a projection come in multiples of it: 75 take longer than 80
LEAST_COSINE = 1e-3  # below it a row pulls no harder: w_i stays finite where a projection vanishes
ROUNDING = 5e-8  # of the sum of all weights: a gap as small is none
NEGLIGIBLE = 0.05  # of the gap: another step like one that gained less would not close it
LESS_CAUTION, MORE_CAUTION = 0.7, 4.0  # factors of the stiffness after a step that gained, or did not
MOST_CAUTION = 1e3  # where F has not grown, it is at its end up to rounding


class DirectionOptions(Options):
    """Options of ``direction``."""

    cosine_weight: float = Field(1.0, ge=0, description="of 1 - cos(x, y)")
    mse_weight: float = Field(0.0, ge=0, description="of |x - y|^2, summed over a row's entries")
    exponent: float = Field(0.75, ge=0, description="rows weigh as their counts to this power")
    center: bool = Field(False, description="subtract the weighted mean row and keep it as the offset")
    tolerance: float = Field(1e-6, gt=0, description="stop when gap / objective is at most this")
    max_steps: int = Field(30, ge=1, description="steps at most")

    @model_validator(mode="after")
    def _one_weight(self) -> DirectionOptions:
        if not self.cosine_weight and not self.mse_weight:
            raise ValueError("cosine_weight, mse_weight: expected one above 0, got two zeros")
        return self


@dataclass(frozen=True)
class DirectionSolution:
    """What ``solve_direction`` found.

    Attributes:
        basis: (H, r), fp64, orthonormal columns in order of decreasing eigenvalue of ``Q^T M Q``: the first k
            of them are a good basis of rank k.
        objective: the weighted sum of 1 - cos and squared errors.
        gap: no basis of this rank has an objective below ``objective - gap``.
        steps: Gram matrices of the table, but for the first.
        converged: whether the gap is within the tolerance. It cannot be where a mixture of subspaces would do
            better than any one of them, as directions are tied at the rank: the gap holds for mixtures, too.
    """

    basis: Tensor
    objective: float
    gap: float
    steps: int
    converged: bool


def direction(
    table: Rows,
    rank: int,
    *,
    counts: Tensor | None = None,
    row_weight: Tensor | None = None,
    world: World | None = None,
    **options: Any,
) -> Factors:
    """Rank-r factors with the least weighted direction error, or squared error, or both.

    The least, over all ``y = codes @ basis``, of::

        p = row_weight, or counts ** exponent, or ones;  p = p / p.sum()
        (p * (cosine_weight * (1 - F.cosine_similarity(x, y)) + mse_weight * (x - y).square().sum(1))).sum()

    with ``y`` the projection of x, the nearest of all best. A row of zeros stays zero and counts as no error.
    With ``center`` the mean row (weighted by p) is subtracted from every x first, and objective and
    certificate are those of the centred rows.

    ``cosine_weight=0, mse_weight=1`` is a weighted SVD; with ``row_weight=fisher_row_weights(...)`` it is
    FWSVD (arXiv 2207.00112).

    Args:
        table: (V, H), in memory or a ``TableFile``, which is read block by block and gives the same bits.
        rank: r, 1 to H.
        counts: (V,) how often each token is read; None weighs all rows alike.
        row_weight: (V,) weights of the rows, instead of counts.
        world: the processes and shards of a run on several, see ``embkern.methods.sharded``. Each process
            reads its own rows; a step gathers H x H values per shard.
        options: the fields of ``DirectionOptions``.

    Returns:
        Factors in the table's dtype, the codes' columns in order of decreasing eigenvalue of M. ``facts``
        has objective, gap, steps and converged, see ``DirectionSolution``.

    Raises:
        ValueError, TypeError: the rank, an option or a weight is out of range, or the table is not usable.
    """
    chosen = parse_options(DirectionOptions, options, "direction")
    check_shape(table)
    check_rank(rank, table.shape[1])
    world = world or World()
    sections = world.sections(table)
    with torch.no_grad(), torch.autocast(table.device.type, enabled=False):
        weight = _relative(counts, row_weight, chosen.exponent, len(table)).to(table.device)
        offset = _mean(sections, weight, world) if chosen.center else None
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
            world.collect(codes),
            solution.basis.t().to(table.dtype).contiguous(),
            None if offset is None else offset.to(table.dtype),
            facts={name: getattr(solution, name) for name in ("objective", "gap", "steps", "converged")},
        )


def _relative(counts: Tensor | None, row_weight: Tensor | None, exponent: float, V: int) -> Tensor:
    """Row weights (V,) that add up to 1."""
    if counts is not None and row_weight is not None:
        raise ValueError("counts, row_weight: expected at most one of them, got both")
    if row_weight is not None:
        return row_weights(row_weight, V, name="row_weight")
    return row_weights(counts, V, exponent)


def _mean(sections: list[Section], weight: Tensor, world: World) -> Tensor:
    """Weighted mean row (H,), fp64; the weights add up to 1."""

    def leaf(section: Section) -> Tensor:
        at, total = section.start, weight.new_zeros(section.rows.shape[1])
        for rows in parts(section.rows):
            total += weight[at : at + len(rows)] @ rows.double()
            at += len(rows)
        return total

    with world.one_thread():
        mean = world.sum(leaf(section) for section in sections)
    if not bool(torch.isfinite(mean).all()):
        _refuse_not_finite(sections, world)
    return mean


def _refuse_not_finite(sections: list[Section], world: World) -> None:
    """Raise, on all processes, and name the rows that are not finite; they were noticed in a sum."""
    bad = world.all([row for section in sections for row in not_finite(section.rows, section.start)])
    world.on_first(lambda: refuse_rows([row for rows in bad for row in rows]))
    raise ValueError("table: expected rows whose squared lengths are below 1e308, got a longer one")


def _project(section: Section, basis: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes (n, r) of a section's rows."""
    codes, at = torch.empty(len(section.rows), basis.shape[1], dtype=dtype, device=basis.device), 0
    for rows in parts(section.rows, offset):
        codes[at : at + len(rows)] = rows @ basis
        at += len(rows)
    return codes


def parts(table: Rows, offset: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the rows of ``table - offset``, GRAM_ROWS at a time, in the dtype of training."""
    for block in wide_blocks(table):
        for rows in block.split(GRAM_ROWS):
            yield rows if offset is None else rows - offset.to(rows.dtype)


@torch.no_grad()
def solve_direction(
    table: Rows,
    rank: int,
    cosine_weight: Tensor,
    mse_weight: Tensor,
    *,
    offset: Tensor | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 30,
    world: World | None = None,
) -> DirectionSolution:
    """Find the basis of rank r with the least ``sum_i a_i (1 - cos(x_i, y_i)) + b_i |x_i - y_i|^2``.

    Args:
        table: (V, H), finite, in memory or a ``TableFile``.
        rank: r, 1 to H.
        cosine_weight: a, (V,), none negative.
        mse_weight: b, (V,), none negative.
        offset: (H,), subtracted from every row first.
        tolerance: stop when gap / objective is at most this.
        max_steps: steps at most.
        world: the processes and shards of a run on several.

    Raises:
        ValueError: the rank or a weight is out of range, or a row is not finite.
    """
    check_rank(rank, table.shape[1])
    world = world or World()
    problem = _Problem(table, cosine_weight, mse_weight, offset, world)
    basis = _leading(problem.start(), rank, world)
    squares = problem.squared_cosines(basis)
    value, upper, steps, caution = problem.value(squares), math.inf, 0, 1.0
    while True:
        gradient, steps = problem.gradient(squares), steps + 1
        eigenvalues = _largest(gradient, rank, world)
        room = float(eigenvalues.sum()) - float((basis * (gradient @ basis)).sum())
        upper = min(upper, value + room + problem.slack(squares))
        allowed = max(tolerance * (1 - value), ROUNDING)
        if upper - value <= allowed or steps == max_steps:
            break
        stiffness, gain = problem.stiffness(value, float(eigenvalues[0])), 0.0
        while not gain and caution < MOST_CAUTION:
            held = gradient + (caution * stiffness) * (basis @ basis.t())
            other = _leading(held, rank, world)
            reached = problem.squared_cosines(other)
            gain = max(problem.value(reached) - value, 0.0)
            caution *= LESS_CAUTION if gain else MORE_CAUTION
        if not gain:
            break
        basis, squares, value = other, reached, value + gain
        if upper - value <= allowed or gain < min(allowed / 2, NEGLIGIBLE * (upper - value)):
            break
    order = _leading(basis.t() @ gradient @ basis, rank, world)
    gap, objective = max(upper - value, 0.0), 1 - value
    return DirectionSolution(
        basis @ order, objective * problem.total, gap * problem.total, steps, gap <= allowed
    )


def _largest(matrix: Tensor, rank: int, world: World) -> Tensor:
    """The r largest eigenvalues (r,) on the CPU, the smallest first; the same on all processes."""
    return world.on_first(lambda: torch.linalg.eigvalsh(matrix)[-rank:].cpu())


def _leading(matrix: Tensor, rank: int, world: World) -> Tensor:
    """Eigenvectors (n, r) of the r largest eigenvalues, the largest first; the same on all processes."""
    vectors = world.on_first(lambda: torch.linalg.eigh(matrix).eigenvectors[:, -rank:].flip(1).cpu())
    return vectors.to(matrix.device)


class _Problem:
    """The rows of this process with their weights, a list entry per shard, and the passes over them.

    Attributes:
        total: the sum of all weights, ``a_i + b_i |x_i|^2``; everything else is in units of it.
        cosine_share: the part of it that is a.
    """

    def __init__(self, table: Rows, a: Tensor, b: Tensor, offset: Tensor | None, world: World) -> None:
        self.world, self.offset, self.width = world, offset, table.shape[1]
        self.sections = world.sections(table)
        a, b = checked_weights("cosine_weight", a, len(table)), checked_weights("mse_weight", b, len(table))
        self.norms, self.cosine, self.squared = [], [], []
        for section in self.sections:
            norm = torch.zeros(len(section.rows), dtype=torch.float64, device=table.device)
            for at, rows in self._parts(section):
                norm[at] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            own = slice(section.start, section.start + len(norm))
            zero = norm < torch.finfo(training_dtype(table)).tiny
            self.cosine.append(a[own].to(norm.device).masked_fill(zero, 0))
            self.squared.append(b[own].to(norm.device) * norm.square())
            self.norms.append(norm.masked_fill(zero, 1))
        cosine = self._sum(lambda number: self.cosine[number].sum())
        self.total = cosine + self._sum(lambda number: self.squared[number].sum())
        if not math.isfinite(self.total):
            _refuse_not_finite(self.sections, world)
        unit = self.total or 1.0  # of a table of zeros nothing can be lost
        self.cosine_share = cosine / unit
        for each in (*self.cosine, *self.squared):
            each /= unit

    def squared_cosines(self, basis: Tensor) -> list[Tensor]:
        """Square of the cosine between each row and its projection onto a basis (H, r)."""
        squares = [torch.empty_like(norm) for norm in self.norms]
        padded = F.pad(basis, (0, -basis.shape[1] % PADDING)).to(training_dtype(self.sections[0].rows))
        with self.world.one_thread():
            for section, norm, out in zip(self.sections, self.norms, squares, strict=True):
                for at, rows in self._parts(section):
                    out[at] = torch.linalg.vector_norm(rows @ padded, dim=1, dtype=torch.float64) / norm[at]
        return [square.square_().clamp_(max=1) for square in squares]

    def value(self, squares: list[Tensor]) -> float:
        """F, given the squared cosines."""
        return self._sum(
            lambda number: (
                self.cosine[number] @ squares[number].sqrt() + self.squared[number] @ squares[number]
            )
        )

    def slack(self, squares: list[Tensor]) -> float:
        """What the bound by M lacks because rows below LEAST_COSINE pull less than they should."""

        def lacking(number: int) -> Tensor:
            c = _bounded(squares[number])
            return (self.cosine[number] / (2 * c)) @ (c - squares[number].sqrt()).square()

        return self._sum(lacking)

    def stiffness(self, value: float, least: float) -> float:
        """How fast F's slope falls as a direction turns into the subspace, were its rows normal and alike.

        ``sum_i a_i u_i^2 v_i^2 / c_i^3`` for u and v at the subspace's edge, where M has the eigenvalue
        ``least``, the mean of c is the value, and the means of u_i^2 and v_i^2 follow from ``least``.
        """
        share = self.cosine_share
        return 4 * share * least**2 / (value * (share + 2 * (1 - share) * value) ** 2) if value else 0.0

    def start(self) -> Tensor:
        """M (H, H) where every cosine is 1/2: a weighted Gram matrix of the unit rows."""
        return self.gradient([torch.full_like(norm, 0.25) for norm in self.norms])

    def gradient(self, squares: list[Tensor]) -> Tensor:
        """M (H, H), given the squared cosines."""
        with self.world.one_thread():
            leaves = (self._leaf(number, square) for number, square in enumerate(squares))
            upper = self.world.sum(leaves).view(self.width, self.width).triu()
        return upper + upper.triu(1).t()

    def _leaf(self, number: int, square: Tensor) -> Tensor:
        """The upper triangle of M, summed over a section, and some of the lower: (H * H,)."""
        weight = self.cosine[number] / (2 * _bounded(square)) + self.squared[number]
        scale = weight.sqrt() / self.norms[number]
        total = scale.new_zeros(self.width, self.width)
        tile, buffer = -(-self.width // GRAM_TILES), None
        for at, rows in self._parts(self.sections[number]):
            # In one place: the pages of a new tensor per part cost as much as half of the products.
            buffer = torch.empty_like(rows) if buffer is None else buffer
            scaled = torch.mul(rows, scale[at].to(rows.dtype).unsqueeze(1), out=buffer[: len(rows)])
            for first in range(0, self.width, tile):
                total[first : first + tile, first:] += scaled[:, first : first + tile].t() @ scaled[:, first:]
        return total.view(-1)

    def _sum(self, leaf: Callable[[int], Tensor]) -> float:
        """A number of the whole table, given that of each section of this process."""
        with self.world.one_thread():
            return float(self.world.sum(leaf(number).view(1) for number in range(len(self.sections))))

    def _parts(self, section: Section) -> Iterator[tuple[slice, Tensor]]:
        at = 0
        for rows in parts(section.rows, self.offset):
            yield slice(at, at + len(rows)), rows
            at += len(rows)


def _bounded(squares: Tensor) -> Tensor:
    return squares.sqrt().clamp_(min=LEAST_COSINE)


@torch.no_grad()
def repair_norms(table: Tensor, factors: Factors) -> Factors:
    """Rescale every reconstructed row to the length nearest to its original: ``y * <x, y> / <y, y>``.

    Directions stay as they are (a row that points backwards is turned round). A projection without offset,
    as of ``svd`` and ``direction``, has these lengths already; an autoencoder trained for direction does not.
    An offset cannot be rescaled by row, so it becomes one more column of the codes: the result has rank r + 1
    and no offset, V values more and no row that could not be had.

    Args:
        table: (V, H), the original rows.
        factors: linear factors of them.

    Raises:
        ValueError: the shapes differ, or the factors have an activation.
    """
    if factors.activation is not None:
        raise ValueError(f"factors: expected linear ones, got the activation {factors.activation!r}")
    if table.shape != (factors.num_embeddings, factors.embedding_dim):
        shape = (factors.num_embeddings, factors.embedding_dim)
        raise ValueError(f"table: expected shape {shape}, got {tuple(table.shape)}")
    codes, basis = factors.codes, factors.basis
    if factors.offset is not None:
        codes = torch.cat([codes, codes.new_ones(len(codes), 1)], 1)
        basis = torch.cat([basis, factors.offset.unsqueeze(0)])
    scaled = torch.empty_like(codes)
    for rows, some, out in zip(*(each.split(GRAM_ROWS) for each in (table, codes, scaled)), strict=True):
        x, y = rows.double(), some.double() @ basis.double()
        squares = y.square().sum(1)
        scale = torch.where(squares > 0, (x * y).sum(1) / squares, 0)
        out.copy_(some.double() * scale.unsqueeze(1))
    return Factors(scaled, basis, facts=factors.facts)
