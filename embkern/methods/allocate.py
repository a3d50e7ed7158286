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
after it, and the best path through a row is searched. From 2 bits on their error is 37 to 48 % below that of
Lloyd-Max levels, which corresponds to a third to half of a bit per value.

Every row has a scale. It is searched so that the direction of the quantised row is the best, and stored so
that the row has the length of its projection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from pydantic import Field
from torch import Tensor

from .._version import __version__
from ..io.tensor_format import checksum_of_parts
from ..ops.packed_codes import GROUP
from ..tables.packed import PackedTable
from ..tables.pruned import PrunedPackedTable
from .allocation import ROW_BITS, Allocation, DirectionAllocation, float_dtype, groups_of
from .base import (
    Options,
    Rows,
    byte_budget,
    check_shape,
    check_table,
    parse_options,
    ratio_error,
    row_weights,
    table_checksum,
)
from .calibration import Calibration
from .magnitude import extreme_exponents, multiplied
from .metric_allocation import SHRINKAGE, MetricAllocation, forms_of, input_frequencies
from .rate_search import RateSearch
from .row_floor import RowFloor
from .sharded import World
from .table_rows import TableRows
from .unseen import ReadRows, is_read

Unseen = Literal["allocate", "mean", "nearest"]


class AllocateOptions(Options):
    """Options of ``allocate``."""

    exponent: float = Field(0.55, ge=0, le=1, description="rows weigh their frequency to this power")
    tiers: int | None = Field(
        None, ge=1, le=16, description="rates that rows may choose from; default: 6, with a calibration 12"
    )
    floor: float | None = Field(None, gt=0, lt=1, description="least cosine of any row with the original")
    speed: float = Field(
        0.0, ge=0, le=1, description="least share of the lookups that read rows of values, without a product"
    )
    unseen: Unseen = Field(
        "allocate",
        description="what rows get that are never read: allocate, a rate as all others; mean, their mean; "
        "nearest, the read row of the most similar direction; the last two store none of them",
    )


BASIS_SHARE = 0.05  # of the budget, for the basis without a calibration
LARGE_BASIS = 0.12  # share of the budget from which smaller bases are tried with a calibration
DIRECTION_TIERS, METRIC_TIERS = 6, 12  # by default


@overload
def allocate(
    table: Rows, *, ratio: float, unseen: Literal["allocate"] = "allocate", **options: Any
) -> PackedTable: ...


@overload
def allocate(
    table: Rows, *, ratio: float, unseen: Literal["mean", "nearest"], **options: Any
) -> PackedTable | PrunedPackedTable: ...


@torch.no_grad()
def allocate(
    table: Rows,
    *,
    ratio: float,
    counts: Tensor | None = None,
    calibration: Calibration | None = None,
    tied: bool = True,
    read: Tensor | None = None,
    world: World | None = None,
    **options: Any,
) -> PackedTable | PrunedPackedTable:
    """Quantise every row at its own rate so that the weighted error is least for the ratio.

    Without a calibration the objective is the direction error: ``(w * (1 - F.cosine_similarity(x,
    y))).sum()`` with ``w = counts ** exponent``. With one it is the divergence from the dense model that the
    errors ``e = x - y`` cause: ``(f ** exponent * (e @ G * e).sum(1)).sum() + (q ** exponent * (e @ S *
    e).sum(1)).sum()``, as ``Calibration`` defines f, G, q and S.

    Args:
        table: (V, H), in memory or a ``TableFile``.
        ratio: bytes of the table as stored over bytes of everything that replaces it.
        counts: (V,), how often each token is read, absolute or relative; None weighs all rows equally, or
            takes the counts of the calibration.
        calibration: what a model's output depends on, from ``embkern.calibrate``.
        tied: with a calibration, whether an output head uses the table as well.
        read: (V,) bool, which rows are read, for ``unseen``; None takes those whose count, or without counts
            the calibration's, is not zero.
        world: the processes of a distributed run, among which the rows are divided, see
            ``embkern.methods.sharded``. Each is given the same arguments and gets the whole result, of the
            same bits as one process makes with as many threads.
        options: the fields of ``AllocateOptions``.

    The table is read in blocks of rows, a few times. Beside it and the result, memory holds less than 250
    bytes a row, most of them the costs of the tiers, and what does not depend on V: some copies of a block,
    and matrices of 32 bytes per H^2 for the eigenvectors of the basis. ``unseen`` copies the rows that are
    read.

    Returns:
        A packed table on the CPU with fp16 scales and basis (bf16 for a bf16 table, fp32 where the range of
        fp16 does not suffice). With ``unseen`` and rows that are not read, a ``PrunedPackedTable``: what this
        method makes of the rows that are read, in the bytes that the map of the ids leaves.

    Raises:
        ValueError, TypeError: the ratio cannot be reached, with the floor if one is given (the message names
            the highest that can), the calibration is that of another table, rows are too long or too short
            for fp32, it is not known which rows are read though ``unseen`` asks for it, an argument is not
            usable, or processes were given different ones (all of them then raise).
        RankLostError: another process ended.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3); Lagrangian
    allocation after Shoham and Gersho (1988); trellis codes: Marcellin and Fischer (1990); errors weighed by
    second moments of gradients and activations: Optimal Brain Surgeon (Hassibi and Stork 1992), GPTQ (arXiv
    2210.17323).
    """
    world = world or World()
    world.check_equal_arguments(lambda: _described(table, ratio, counts, calibration, tied, read, options))
    chosen = parse_options(AllocateOptions, options, "allocate")
    check_table(table)
    budget, refusal = byte_budget(table, ratio), functools.partial(ratio_error, table, ratio)
    if calibration is not None:
        calibration.check_table(table.shape)
    read = None if chosen.unseen == "allocate" else is_read(len(table), read, counts, calibration)
    if calibration is not None and counts is None:
        counts = input_frequencies(calibration)
    if chosen.unseen == "allocate" or read is None or read.all():
        return _packed(table, budget, counts, calibration, tied, chosen, refusal, world)
    rows = ReadRows(table, read, chosen.unseen)
    packed = _packed(
        rows.table,
        max(0, budget - rows.nbytes),
        None if counts is None else counts[rows.kept],
        None if calibration is None else calibration.of_rows(rows.kept),
        tied,
        chosen,
        lambda least, condition: refusal(least + rows.nbytes, condition),
        world,
    )
    return rows.pruned(packed, counts)


def _packed(
    table: Rows,
    budget: int,
    counts: Tensor | None,
    calibration: Calibration | None,
    tied: bool,
    chosen: AllocateOptions,
    refusal: Callable[[float, str], ValueError],
    world: World,
) -> PackedTable:
    """Return the packed table of all rows in ``budget`` bytes.

    ``refusal(least, condition)`` is the error of a budget below the fewest bytes that are possible.
    """
    tiers = chosen.tiers or (DIRECTION_TIERS if calibration is None else METRIC_TIERS)
    exponents = extreme_exponents(table, alike=calibration is not None)
    rows = TableRows(table, exponents, world)
    dtype, width = float_dtype(rows), table.shape[1]
    most_groups = groups_of(width) if chosen.speed < 1 else 0  # of the basis
    row_bytes = GROUP * dtype.itemsize * width  # of a group of rows of the basis
    candidates: Iterator[Allocation]
    if calibration is None:
        weights = row_weights(counts, len(table), chosen.exponent)
        groups = min(most_groups, round(BASIS_SHARE * budget / row_bytes))
        candidates = iter([DirectionAllocation(rows, weights, dtype, groups)])
    else:
        forms = forms_of(calibration, counts, tied=tied, exponent=chosen.exponent, shrinkage=SHRINKAGE)
        sizes = _basis_sizes(most_groups, row_bytes / max(1, budget))
        candidates = (MetricAllocation(rows, forms, dtype, size) for size in sizes)
    fast = world.on_first(lambda: _fast_rows(counts, len(table), chosen.speed))
    best = _best_plan(candidates, budget, tiers, fast, chosen, refusal)
    packed = best.allocation.refitted(best.allocation.packed(best.kept, best.choice), chosen.floor)
    return packed if exponents is None else multiplied(packed, exponents)


class _Plan(NamedTuple):
    """The tiers, and the tier of every row, that an allocation chose within the budget."""

    cost: float
    allocation: Allocation
    kept: list[int]
    choice: Tensor


_Search: TypeAlias = tuple[RateSearch, RowFloor | None]


def _best_plan(
    candidates: Iterator[Allocation],
    budget: int,
    most: int,
    fast: Tensor,
    chosen: AllocateOptions,
    refusal: Callable[[float, str], ValueError],
) -> _Plan:
    """Return the plan of up to ``most`` tiers that costs least; a candidate that costs more is the last one.

    The costs of the rows take more memory than anything else that grows with V. Those of one candidate exist
    at a time, and none after the return.
    """
    best: _Plan | None = None
    refused: list[_Search] = []
    for allocation in candidates:
        searches = _searches(allocation, fast, chosen.floor)
        plans = [plan for each in searches if (plan := _plan_of(allocation, budget, most, *each))]
        plan = min([*([] if best is None else [best]), *plans], key=lambda each: each.cost, default=None)
        if best is not None and plan is best:
            break
        best = plan
        refused = refused + searches if best is None else []
        del searches
    if best is None:
        conditions = {"floor": chosen.floor, "speed": chosen.speed or None}
        given = [f"{name} {value:g}" for name, value in conditions.items() if value is not None]
        condition = f" with {' and '.join(given)}" if given else ""
        raise refusal(min(_least_bytes(*each) for each in refused), condition)
    return best


def _searches(allocation: Allocation, fast: Tensor, floor: float | None) -> list[_Search]:
    """Return searches for the tiers of an allocation, of which rows that are ``fast`` (V,) take no basis."""
    costs = allocation.costs()
    for index, tier in enumerate(allocation.tiers):
        if tier.transform:
            costs[index].masked_fill_(fast, math.inf)
    row_floor = None if floor is None else RowFloor(allocation, floor, costs)
    # A search drops tiers one by one. It would keep a basis that only pays for none at all.
    counts = [len(costs), *([len(ROW_BITS)] if allocation.also_without_basis else [])]
    return [
        (RateSearch(costs[:count], allocation.tiers[:count], allocation.shared_bytes), row_floor)
        for count in counts
    ]


def _plan_of(
    allocation: Allocation, budget: int, most: int, search: RateSearch, floor: RowFloor | None
) -> _Plan | None:
    """Return what a search finds within the budget, with all rows above the floor, or None."""
    world, choose = allocation.rows.world, functools.partial(search.within, budget, most)
    while (found := world.on_first(choose)) and floor and not floor.holds(*found):
        pass  # Some rows may no longer have the tiers that were chosen for them.
    if not found:
        return None
    return _Plan(world.on_first(functools.partial(search.cost_of, *found)), allocation, *found)


def _described(
    table: Rows,
    ratio: float,
    counts: Tensor | None,
    calibration: Calibration | None,
    tied: bool,
    read: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return what the arguments of ``allocate`` are, by name, to compare those of several processes.

    What cannot be described raises here, with the message that a single process gives.
    """
    check_shape(table)
    row_weights(counts, len(table))
    of = calibration
    sums = [] if of is None else [of.inputs, of.input_moment, of.predictions, of.head_moment]
    tensors = {"counts": [counts], "calibration": sums, "read": [read]}
    given = {name: [each for each in parts if each is not None] for name, parts in tensors.items()}
    return {
        "table": f"{tuple(table.shape)} of {table.dtype} ({table_checksum(table)})",
        "ratio": ratio,
        **{name: checksum_of_parts(parts) if parts else None for name, parts in given.items()},
        "tied": tied,
        "options": dict(sorted(options.items())),
        "embkern": __version__,
    }


def _fast_rows(counts: Tensor | None, num_embeddings: int, share: float) -> Tensor:
    """Return which rows (V,), those with the highest counts, make up a share of the lookups."""
    frequencies = row_weights(counts, num_embeddings)
    order = frequencies.argsort(descending=True, stable=True)
    before = frequencies[order].cumsum(0) - frequencies[order]
    fast = torch.zeros(num_embeddings, dtype=torch.bool)
    fast[order] = before < share
    return fast if share < 1 else torch.ones_like(fast)


def _least_bytes(search: RateSearch, floor: RowFloor | None) -> float:
    """Return the bytes of the smallest table whose rows reach the floor."""
    if floor is not None:
        for kept in search.with_and_without_basis():
            while not floor.holds(kept, search.smallest(kept)):
                pass
    return search.least_bytes()


def _basis_sizes(groups: int, share: float) -> Iterator[int]:
    """Yield numbers of groups of a basis to try, each of which takes a share of the budget.

    The first is the whole basis. It is the best unless the budget is small for the width of the table.
    """
    yield groups
    while groups and groups * share > LARGE_BASIS:
        groups = groups * 3 // 4
        yield groups
