"""Tensor trains of several tables that share one central core."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tables.tensor_train import TensorTrainTable
from .base import byte_budget, check_table, parse_options
from .storage import rounded, storage_dtype
from .tensor_train import (
    TensorTrainOptions,
    exact_factors,
    interleaved,
    padded_factors,
    shape_of,
    table_of_cores,
    tt_svd,
)

SWEEPS = 12  # of alternating least squares
SOLVER_STEPS = 10  # of conjugate gradients for the central core, in each sweep
_RIDGE = 1e-8  # relative, in the systems of the outer cores

Cores = tuple[Tensor, Tensor]  # the first and the last of a table


@torch.no_grad()
def shared_tensor_trains(
    tables: Sequence[Tensor], *, ratio: float | Sequence[float], **options: Any
) -> list[TensorTrainTable]:
    """Factorise tables into tensor trains with one central core, which is stored and counted once.

    ``y_t = A_t[i1, j1] @ C[:, i2, j2] @ B_t[:, i3, j3]`` for each table t, with auxiliary cores ``A_t`` and
    ``B_t`` of its own and the central core ``C`` (r1, v2, h2, r2) of all. ``v2`` is the middle factor of the
    rows of the largest table, ``h2`` that of its columns, or the largest smaller one that divides all widths.

    The cores begin as those of TT-SVD: C as that of the table with the largest sum of squares, at the ranks
    with the least error of it that fit the bytes of all. Alternating least squares then lowers the sum of the
    squared errors, with ``scales`` those of the rows' directions, so that each table counts as many times as
    it has rows.

    Args:
        tables: (V, H) each, of one dtype.
        ratio: bytes of the tables as stored over the bytes of all that replaces them; or one for each table.
        options: the fields of ``TensorTrainOptions``, with three cores and automatic shapes.

    Returns:
        The tables in their order. Their ``core_2`` is one tensor; ``joint_bytes`` counts it once.

    Raises:
        ValueError, TypeError: the ratio cannot be reached, or an argument is not usable.

    Source: Z.-F. Gao et al., matrix product operators with a shared central tensor, arXiv 2303.16753.
    """
    chosen = parse_options(TensorTrainOptions, options, "shared_tensor_trains")
    if chosen.cores != 3 or chosen.rows or chosen.columns:
        raise ValueError(
            "cores, rows, columns: expected three cores of automatic shapes to share the central one"
        )
    if len(tables) < 1:
        raise ValueError("tables: expected at least one, got none")
    ratios = [ratio] * len(tables) if isinstance(ratio, (int, float)) else list(ratio)
    if len(ratios) != len(tables):
        raise ValueError(
            f"ratio: expected one number or {len(tables)}, one for each table, got {len(ratios)}"
        )
    for table in tables:
        check_table(table)
        if table.dtype != tables[0].dtype or table.device != tables[0].device:
            raise TypeError(
                f"tables: expected one dtype and device, got {tables[0].dtype}, {tables[0].device} and "
                f"{table.dtype}, {table.device}"
            )
    dtype = storage_dtype(tables[0], chosen.storage)
    shapes = _shapes(tables, chosen)
    targets = [
        interleaved(F.normalize(table.double(), eps=1e-30) if chosen.scales else table.double(), *shape)
        for table, shape in zip(tables, shapes, strict=True)
    ]
    budget = sum(byte_budget(table, each) for table, each in zip(tables, ratios, strict=True))
    values = (budget - dtype.itemsize * chosen.scales * sum(map(len, tables))) // dtype.itemsize
    ends = sum(each.shape[0] for each in targets), sum(each.shape[2] for each in targets)
    least = sum(ends) + targets[0].shape[1]
    if values < least:
        highest = sum(each.nbytes for each in tables) / (
            dtype.itemsize * (least + chosen.scales * sum(map(len, tables)))
        )
        raise ValueError(
            f"ratio: {ratio} leaves no room for rank 1; the highest that fits all is {highest:.3f}"
        )
    lead = max(range(len(tables)), key=lambda each: float(targets[each].square().sum()))
    first, core, last = tt_svd(targets[lead], values, ends)
    outer = [_begun(target, core) for target in targets]
    outer[lead] = (first, last)
    core = _fitted(targets, outer, core)
    stored = rounded(core, dtype)
    found = []
    for table, shape, (left, right) in zip(tables, shapes, outer, strict=True):
        cores = [rounded(left, dtype), stored, rounded(right, dtype)]
        found.append(table_of_cores(table, cores, *shape, scales=chosen.scales))
    return [dataclasses.replace(each, core_2=found[0].core_2, check=False) for each in found]


def joint_bytes(tables: Sequence[TensorTrainTable]) -> int:
    """Return the bytes of the tensors of several tables, of those that some share once."""
    tensors = {each.data_ptr(): each.nbytes for table in tables for each in table.tensors().values()}
    return sum(tensors.values())


def _shapes(tables: Sequence[Tensor], chosen: TensorTrainOptions) -> list[tuple[list[int], list[int]]]:
    """Return the factors of the rows and of the columns of each table, of which the middle ones are equal."""
    largest = max(tables, key=lambda each: each.numel())
    V, H = largest.shape
    (_, v2, _), (_, h2, _) = shape_of(V, H, chosen)
    common = math.gcd(*(table.shape[1] for table in tables))
    if common % h2:
        h2 = max(each for each in range(1, h2 + 1) if common % each == 0)
    found = []
    for V, H in (table.shape for table in tables):
        (v1, v3), (h3, h1) = padded_factors(-(-V // v2), 2), exact_factors(H // h2, 2)
        found.append(([v1, v2, v3], [h1, h2, h3]))
    return found


def _begun(target: Tensor, core: Tensor) -> Cores:
    """Return outer cores for a table and a given central one, to begin with."""
    n3, r2 = target.shape[2], core.shape[2]
    gram = target.flatten(0, 1).t() @ target.flatten(0, 1)
    right = F.pad(torch.linalg.eigh(gram)[1].flip(1)[:, :r2].t(), (0, 0, 0, max(0, r2 - n3)))
    return _best_first(target, core, right), right


def _best_first(target: Tensor, core: Tensor, last: Tensor) -> Tensor:
    """Return the first core (n1, r1) with the least squared error beside the other two."""
    return _solved((core @ last).flatten(1), target.flatten(1))


def _best_last(target: Tensor, first: Tensor, core: Tensor) -> Tensor:
    """Return the last core (r2, n3) with the least squared error beside the other two."""
    left = torch.tensordot(first, core, 1).flatten(0, 1)
    return _solved(left.t(), target.flatten(0, 1).t()).t()


def _solved(basis: Tensor, target: Tensor) -> Tensor:
    """Return x (n, r) with the least ``|x @ basis - target|``, for a basis (r, m) and a target (n, m)."""
    gram = basis @ basis.t()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp_min(1e-200))
    return torch.linalg.solve(gram, basis @ target.t()).t()


def _fitted(targets: list[Tensor], outer: list[Cores], core: Tensor) -> Tensor:
    """Lower the sum of squared errors by alternating least squares; update ``outer``, return the core."""
    for _ in range(SWEEPS):
        for number, target in enumerate(targets):
            first = _best_first(target, core, outer[number][1])
            outer[number] = (first, _best_last(target, first, core))
        core = _central(targets, outer, core)
    for number, target in enumerate(targets):
        first = _best_first(target, core, outer[number][1])
        outer[number] = (first, _best_last(target, first, core))
    return core


def _central(targets: list[Tensor], outer: list[Cores], core: Tensor) -> Tensor:
    """Return a central core of less squared error, by steps of conjugate gradients from ``core``.

    The normal equations are ``sum_t (A_t^T A_t) C (B_t B_t^T) = sum_t A_t^T X_t B_t^T``, slice by slice.
    """
    grams = [(first.t() @ first, last @ last.t()) for first, last in outer]

    def product(value: Tensor) -> Tensor:
        return sum((torch.tensordot(left, value @ right, 1) for left, right in grams), torch.zeros_like(core))

    right_side = sum(
        (
            torch.tensordot(first.t(), target, 1) @ last.t()
            for target, (first, last) in zip(targets, outer, strict=True)
        ),
        torch.zeros_like(core),
    )
    # The diagonal of the system, (r1, 1, r2), as a preconditioner.
    scale = sum(
        (left.diagonal()[:, None, None] * right.diagonal() for left, right in grams),
        torch.zeros_like(core[:, :1]),
    ).clamp_min(1e-300)
    residual = right_side - product(core)
    step = residual / scale
    power = float((residual * step).sum())
    for _ in range(SOLVER_STEPS):
        if power <= 1e-24 * float((right_side.square() / scale).sum()):
            break
        image = product(step)
        length = power / float((step * image).sum())
        core, residual = core + length * step, residual - length * image
        direction = residual / scale
        before, power = power, float((residual * direction).sum())
        step = direction + power / before * step
    return core
