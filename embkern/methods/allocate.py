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

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..tables.packed import PackedTable
from .allocation import DirectionAllocation
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
from .rate_search import RateSearch, at_least


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
    allocation = DirectionAllocation(rows, weights, table.dtype, budget)
    costs = allocation.costs(exact=chosen.floor is not None)
    if chosen.floor is not None:
        costs = at_least(chosen.floor, allocation.cosines(), costs)
    search = RateSearch(costs, allocation.tiers, allocation.shared_bytes)
    found = search.within(budget, chosen.tiers)
    if found is None:
        condition = "" if chosen.floor is None else f" with floor {chosen.floor:g}"
        raise ratio_error(table, ratio, search.least_bytes(), condition)
    return allocation.refitted(allocation.packed(*found), chosen.floor)
