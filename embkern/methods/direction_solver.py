"""The optimisation behind ``direction``: the best basis for directions, and a bound that certifies it.

A decoder without bias reconstructs rows in the span of an orthonormal Q (H, r). For a given Q the projection
``y = Q Q^T x`` has the least squared error and the largest cosine, for every row. With row weights a, b >=
0::

    min over codes and basis of  sum_i a_i (1 - cos(x_i, y_i)) + b_i |x_i - y_i|^2
      =  sum_i a_i + b_i |x_i|^2  -  max over Q of F(Q Q^T),
    F(P) = sum_i a_i c_i + b_i |x_i|^2 c_i^2,    c_i^2 = x_i^T P x_i / |x_i|^2

F is concave in P. Its gradient at P is ``M = sum_i w_i x_i x_i^T / |x_i|^2`` (H, H) with
``w_i = a_i / (2 c_i) + b_i |x_i|^2``. Two things follow:

- the gap: the sum of the r largest eigenvalues of M, less tr(M P), bounds what any other Q could gain;
- the step: Q becomes the r leading eigenvectors of ``M + stiffness * Q Q^T``.

Without the second term a step overshoots. M is the gradient at Q alone: a direction that enters the subspace
gains less than its eigenvalue says, one that leaves it loses more, and nearly tied directions would alternate
forever. The second term penalises the distance between the old and the new subspace. With a stiffness near
the curvature of F a step is nearly a Newton step, and two or three steps suffice. A step that does not
increase F is repeated with more damping, which makes it follow the gradient in the limit.

A step is two passes over the table, a Gram matrix and a projection. Products run by blocks in fp32 (float64
for a float64 table), sums over blocks and eigenvectors in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Rows, raise_for_rows, rows_not_finite, training_blocks, training_dtype
from .sharded import Section, World

GRAM_ROWS = 2048  # rows of a product, which is summed in the dtype of training
GRAM_TILES = 4  # column tiles of a Gram matrix, of which only the upper triangle is computed
PADDING = 8  # columns of a projection are padded to a multiple of 8: 75 columns take longer than 80
LEAST_COSINE = 1e-3  # lower bound of c_i in w_i, which keeps w_i finite where a projection vanishes
ROUNDING = 5e-8  # of the sum of all weights; a smaller gap is rounding error
NEGLIGIBLE_GAIN = 0.05  # of the gap; after a step that gained less, further steps would not close the gap
DAMPING_DECREASE, DAMPING_INCREASE = 0.7, 4.0  # factors of the damping after a step that gained, or did not
MAX_DAMPING = 1e3  # where even such a step does not increase F, F is at its maximum up to rounding


@dataclass(frozen=True)
class DirectionSolution:
    """What ``solve_direction`` found.

    Attributes:
        basis: (H, r) float64, orthonormal columns in order of decreasing eigenvalue of ``Q^T M Q``: the first
            k of them are a good basis of rank k.
        objective: the weighted sum of 1 - cos and squared errors.
        gap: no basis of this rank has an objective below ``objective - gap``.
        steps: Gram matrices of the table, except the initial one.
        converged: whether the gap is within the tolerance. The gap holds for mixtures of subspaces, too.
            Where directions are nearly tied at the rank, a mixture is better than any single subspace, and
            the gap cannot close.
    """

    basis: Tensor
    objective: float
    gap: float
    steps: int
    converged: bool


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

    The caller checks the shapes, the rank and the weights; only the values of the table are checked here, in
    the sums that are computed anyway.

    Args:
        table: (V, H), in memory or a ``TableFile``.
        rank: r, 1 to H.
        cosine_weight: a, (V,) float64, finite, none negative.
        mse_weight: b, (V,) float64, finite, none negative.
        offset: (H,), subtracted from every row first.
        tolerance: stop when gap / objective is at most this.
        max_steps: steps at most.
        world: the processes and shards of a distributed run.

    Raises:
        ValueError: a row is not finite.
    """
    world = world or World()
    problem = _Problem(table, cosine_weight, mse_weight, offset, world)
    basis = _leading_eigenvectors(problem.initial_gradient(), rank, world)
    squares = problem.squared_cosines(basis)
    value, upper, steps, damping = problem.value(squares), math.inf, 0, 1.0
    while True:
        gradient, steps = problem.gradient(squares), steps + 1
        eigenvalues = _largest_eigenvalues(gradient, rank, world)
        room = float(eigenvalues.sum()) - float((basis * (gradient @ basis)).sum())
        upper = min(upper, value + room + problem.bound_correction(squares))
        allowed = max(tolerance * (1 - value), ROUNDING)
        if upper - value <= allowed or steps == max_steps:
            break
        stiffness, gain = problem.curvature(value, float(eigenvalues[0])), 0.0
        while not gain and damping < MAX_DAMPING:
            damped = gradient + (damping * stiffness) * (basis @ basis.t())
            candidate = _leading_eigenvectors(damped, rank, world)
            candidate_squares = problem.squared_cosines(candidate)
            gain = max(problem.value(candidate_squares) - value, 0.0)
            damping *= DAMPING_DECREASE if gain else DAMPING_INCREASE
        if not gain:
            break
        basis, squares, value = candidate, candidate_squares, value + gain
        if upper - value <= allowed or gain < min(allowed / 2, NEGLIGIBLE_GAIN * (upper - value)):
            break
    order = _leading_eigenvectors(basis.t() @ gradient @ basis, rank, world)
    gap, objective = max(upper - value, 0.0), 1 - value
    return DirectionSolution(
        basis @ order, objective * problem.total, gap * problem.total, steps, gap <= allowed
    )


def _largest_eigenvalues(matrix: Tensor, rank: int, world: World) -> Tensor:
    """Return the r largest eigenvalues (r,) on the CPU, ascending; the same on all processes."""
    return world.on_first(lambda: torch.linalg.eigvalsh(matrix)[-rank:].cpu())


def _leading_eigenvectors(matrix: Tensor, rank: int, world: World) -> Tensor:
    """Return the eigenvectors (n, r) of the r largest eigenvalues, descending; the same on all processes."""
    vectors = world.on_first(lambda: torch.linalg.eigh(matrix).eigenvectors[:, -rank:].flip(1).cpu())
    return vectors.to(matrix.device)


class _Problem:
    """F and its gradient over the rows of all processes; lists have an entry per shard of this process.

    Attributes:
        total: the sum of all weights, ``a_i + b_i |x_i|^2``. F and M are divided by it.
        cosine_share: the sum of a_i over ``total``.
    """

    def __init__(self, table: Rows, a: Tensor, b: Tensor, offset: Tensor | None, world: World) -> None:
        self.world, self.offset, self.width = world, offset, table.shape[1]
        self.sections = world.sections(table)
        self.norms, self.cosine_weights, self.squared_weights = [], [], []
        for section in self.sections:
            norm = torch.zeros(len(section.rows), dtype=torch.float64, device=table.device)
            for part, rows in self._parts(section):
                norm[part] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            own = slice(section.start, section.start + len(norm))
            zero = norm < torch.finfo(training_dtype(table)).tiny
            self.cosine_weights.append(a[own].to(norm.device).masked_fill(zero, 0))
            self.squared_weights.append(b[own].to(norm.device) * norm.square())
            self.norms.append(norm.masked_fill(zero, 1))
        cosine = self._sum(lambda shard: self.cosine_weights[shard].sum())
        self.total = cosine + self._sum(lambda shard: self.squared_weights[shard].sum())
        if not math.isfinite(self.total):
            raise_not_finite(self.sections, world)
        unit = self.total or 1.0  # a table of zeros has no error
        self.cosine_share = cosine / unit
        for weights in (*self.cosine_weights, *self.squared_weights):
            weights /= unit

    def squared_cosines(self, basis: Tensor) -> list[Tensor]:
        """Return c_i^2 for the projections onto a basis (H, r)."""
        squares = [torch.empty_like(norm) for norm in self.norms]
        padded = F.pad(basis, (0, -basis.shape[1] % PADDING)).to(training_dtype(self.sections[0].rows))
        with self.world.one_thread():
            for section, norm, out in zip(self.sections, self.norms, squares, strict=True):
                for part, rows in self._parts(section):
                    lengths = torch.linalg.vector_norm(rows @ padded, dim=1, dtype=torch.float64)
                    out[part] = lengths / norm[part]
        return [square.square_().clamp_(max=1) for square in squares]

    def value(self, squares: list[Tensor]) -> float:
        """Return F, given the squared cosines."""
        return self._sum(
            lambda shard: (
                self.cosine_weights[shard] @ squares[shard].sqrt()
                + self.squared_weights[shard] @ squares[shard]
            )
        )

    def bound_correction(self, squares: list[Tensor]) -> float:
        """Return what the bound by M lacks because w_i is clamped for cosines below LEAST_COSINE."""

        def shard_sum(shard: int) -> Tensor:
            c = _clamped_cosines(squares[shard])
            return (self.cosine_weights[shard] / (2 * c)) @ (c - squares[shard].sqrt()).square()

        return self._sum(shard_sum)

    def curvature(self, value: float, eigenvalue: float) -> float:
        """Estimate the curvature of F for a rotation of the subspace, from its value and the r-th eigenvalue.

        It is ``sum_i a_i u_i^2 v_i^2 / c_i^3`` for the components u_i and v_i of the unit rows along a
        direction inside and one outside the subspace. The estimate takes the mean of c_i to be ``value`` and
        the components to be normal; their mean squares follow from ``eigenvalue``.
        """
        share = self.cosine_share
        return 4 * share * eigenvalue**2 / (value * (share + 2 * (1 - share) * value) ** 2) if value else 0.0

    def initial_gradient(self) -> Tensor:
        """Return M (H, H) for cosines that are all 1/2: a weighted Gram matrix of the unit rows."""
        return self.gradient([torch.full_like(norm, 0.25) for norm in self.norms])

    def gradient(self, squares: list[Tensor]) -> Tensor:
        """Return M (H, H), given the squared cosines."""
        with self.world.one_thread():
            shards = (self._shard_gradient(shard, square) for shard, square in enumerate(squares))
            upper = self.world.sum(shards).view(self.width, self.width).triu()
        return upper + upper.triu(1).t()

    def _shard_gradient(self, shard: int, square: Tensor) -> Tensor:
        """Return M of a shard as (H * H,); of the lower triangle only the diagonal tiles are computed."""
        weight = self.cosine_weights[shard] / (2 * _clamped_cosines(square)) + self.squared_weights[shard]
        scale = weight.sqrt() / self.norms[shard]
        total = scale.new_zeros(self.width, self.width)
        tile, buffer = -(-self.width // GRAM_TILES), None
        for part, rows in self._parts(self.sections[shard]):
            # One buffer for all parts: the page faults of new tensors cost half as much as the products.
            buffer = torch.empty_like(rows) if buffer is None else buffer
            scaled = torch.mul(rows, scale[part].to(rows.dtype).unsqueeze(1), out=buffer[: len(rows)])
            for first in range(0, self.width, tile):
                total[first : first + tile, first:] += scaled[:, first : first + tile].t() @ scaled[:, first:]
        return total.view(-1)

    def _sum(self, shard_sum: Callable[[int], Tensor]) -> float:
        """Sum a scalar over all shards of all processes."""
        with self.world.one_thread():
            return float(self.world.sum(shard_sum(shard).view(1) for shard in range(len(self.sections))))

    def _parts(self, section: Section) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of a section, centred, with their places in it."""
        first = 0
        for rows in row_parts(section.rows, self.offset):
            yield slice(first, first + len(rows)), rows
            first += len(rows)


def _clamped_cosines(squares: Tensor) -> Tensor:
    return squares.sqrt().clamp_(min=LEAST_COSINE)


def row_parts(table: Rows, offset: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the rows of ``table - offset``, GRAM_ROWS at a time, in the dtype of training."""
    for block in training_blocks(table):
        for rows in block.split(GRAM_ROWS):
            yield rows if offset is None else rows - offset.to(rows.dtype)


def raise_not_finite(sections: list[Section], world: World) -> NoReturn:
    """Raise the same error on all processes after a sum was not finite, and name the rows at fault."""
    bad = world.gather([row for section in sections for row in rows_not_finite(section.rows, section.start)])
    world.on_first(lambda: raise_for_rows([row for rows in bad for row in rows]))
    raise ValueError("table: expected rows whose squared lengths are below 1e308, got a longer one")
