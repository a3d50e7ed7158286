"""Definition of packed_logits and its gradients, a piece of the table at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..packed_format import GROUP, PackedTensors, tiers_of_rows
from .gather_decode import gather_decode_forward
from .numerics import accumulation_dtype, autocast_off

PIECE_ROWS = 16384  # 38 MB at H = 576; on a GPU fewer rows would be bound by launches.

Decode = Callable[..., Tensor]  # with the arguments of gather_decode_forward


@autocast_off
def packed_logits_forward(
    hidden: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    decode: Decode = gather_decode_forward,
) -> Tensor:
    """``hidden @ gather_decode(arange(V), ...).T``: hidden (N, H); (N, V) in the dtype of hidden."""
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
    logits = hidden.new_empty(len(hidden), len(scales))
    for ids, columns in zip(_pieces(scales), logits.split(PIECE_ROWS, 1), strict=True):
        rows = decode(ids, *packed, hidden.shape[1], 1.0)
        columns.copy_(hidden @ rows.to(hidden.dtype).t())
    return logits


@autocast_off
def packed_logits_backward(
    grad: Tensor,
    hidden: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    needs_hidden: bool,
    needs_scales: bool,
    needs_basis: bool,
    needs_offset: bool,
    decode: Decode = gather_decode_forward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, scales, basis and offset for grad (N, V); one that is not needed is empty.

    They are of fp32, or of float64 where the tensor is.
    """
    codes = (records, directory, tiers, levels)
    floats = (hidden, scales, basis, offset)
    needs = (needs_hidden, needs_scales, needs_basis, needs_offset)
    wide: list[Any] = [each if each is None else each.to(accumulation_dtype(each.dtype)) for each in floats]
    _, wide_scales, wide_basis, _ = wide
    sums: list[Any] = [
        torch.zeros_like(each) if needed else hidden.new_empty(0)
        for each, needed in zip(wide, needs, strict=True)
    ]
    width = GROUP * (tiers.shape[1] - 1)
    # With no tier in the basis the rows that are decoded are the values of the codes.
    of_values: tuple[Tensor, ...] = (
        records,
        directory,
        torch.cat([torch.zeros_like(tiers[:, :1]), tiers[:, 1:]], 1),
        levels,
    )
    in_basis = tiers[:, 0].bool()[tiers_of_rows(directory)[: len(scales)].long()]
    for ids, columns in zip(_pieces(scales), grad.split(PIECE_ROWS, 1), strict=True):
        if needs_hidden:
            rows = decode(ids, *codes, scales, basis, offset, hidden.shape[1], 1.0)
            sums[0] += columns @ rows.to(grad.dtype)
        if not any(needs[1:]):
            continue
        upstream = (columns.t() @ hidden).to(wide_scales.dtype)  # The gradient of the rows.
        if needs_scales:
            ones = torch.ones_like(wide_scales)
            unscaled = decode(ids, *codes, ones, wide_basis, None, hidden.shape[1], 1.0)
            sums[1][ids] = (unscaled * upstream).sum(1)
        if needs_basis:
            size = min(len(wide_basis), width)
            values = decode(ids, *of_values, wide_scales, None, None, width, 1.0)
            coefficients = values[:, :size] * in_basis[ids].unsqueeze(1)
            sums[2][:size] += coefficients.t() @ upstream
        if needs_offset:
            sums[3] += upstream.sum(0)
    return sums[0], sums[1], sums[2], sums[3]


def _pieces(scales: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.arange(len(scales), device=scales.device).split(PIECE_ROWS)
    return pieces
