"""Rows of extreme length, brought to a usual one by powers of two, which are exact, and back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..tables.packed import PackedTable
from .base import Rows, blocks

# The search multiplies squares of rows, and divides by them: beyond 2^32 or below 2^-32 these leave fp32.
_USUAL = 32


def extreme_exponents(table: Rows, *, alike: bool) -> Tensor | None:
    """Return by which powers of two to divide rows (V,) int32, or None for a table without extreme rows.

    Args:
        table: (V, H), finite.
        alike: whether all rows have to be divided by the same one, as their lengths are compared.

    Raises:
        ValueError: ``alike``, and some rows are extreme in comparison with others; the message names up to 8.
    """
    # Not by rows.abs(): malloc would not take the place of one block, under its result, for the next one.
    ends = (torch.stack(rows.aminmax(dim=1)) for rows in blocks(table))
    largest = torch.cat([each.abs().amax(0).to("cpu", torch.float64) for each in ends])
    exponents = torch.frexp(largest).exponent
    extreme = (largest > 0) & (exponents.abs() > _USUAL)
    if not extreme.any():
        return None
    if not alike:
        return torch.where(extreme, exponents, 0)
    common = exponents[largest > 0].max().expand(len(largest))
    _refuse((largest > 0) & (common - exponents > _USUAL), "lengths that a calibration can compare")
    return common


def multiplied(packed: PackedTable, exponents: Tensor) -> PackedTable:
    """Return a packed table with its rows multiplied by powers of two, exactly.

    Raises:
        ValueError: the scale of a row leaves the range of the scales' dtype; the message names up to 8 rows.
    """
    wanted = torch.ldexp(packed.scales.double(), exponents)
    scales = wanted.to(packed.scales.dtype)
    _refuse(scales.double() != wanted, f"lengths within the range of {packed.scales.dtype}")
    return dataclasses.replace(packed, scales=scales)


def _refuse(wrong: Tensor, expected: str) -> None:
    if bool(wrong.any()):
        ids = torch.nonzero(wrong).flatten()
        shown = ", ".join(map(str, ids[:8].tolist())) + (", ..." if len(ids) > 8 else "")
        raise ValueError(f"table: expected rows of {expected}, got other ones in {len(ids)} row(s): {shown}")
