"""Definition of packed_logits and its gradients, a piece of the table at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..packed_codes import GROUP
from ..packed_format import PackedTensors, tiers_of_rows
from .gather_decode import gather_decode_forward, gather_decode_in_aten
from .numerics import accumulation_dtype, autocast_off, sums_dtype

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
    logits = hidden.new_empty(hidden.shape[0], len(scales))
    for ids, columns in zip(_pieces(scales), logits.split(PIECE_ROWS, 1), strict=True):
        rows = decode(ids, *packed, hidden.shape[1], 1.0)
        columns.copy_(hidden @ rows.to(hidden.dtype).t())
    return logits


@autocast_off
def packed_logits_in_aten(
    hidden: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``packed_logits_forward`` without writes in place, which ONNX does not have."""
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
    rows = (gather_decode_in_aten(ids, *packed, hidden.shape[1], 1.0) for ids in _pieces(scales))
    return torch.cat([hidden @ piece.to(hidden.dtype).t() for piece in rows], 1)


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

    They are of fp32, or of float64 if hidden or scales are.
    """
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
    needs = (needs_hidden, needs_scales, needs_basis, needs_offset)
    sums = PackedGradients(hidden, packed, needs, decode)
    for ids, columns in zip(_pieces(scales), grad.split(PIECE_ROWS, 1), strict=True):
        sums.add(ids, columns)
    return sums.results()


class PackedGradients:
    """Sums of gradients of hidden, scales, basis and offset over pieces of the gradient of the logits."""

    def __init__(
        self, hidden: Tensor, packed: PackedTensors, needs: tuple[bool, bool, bool, bool], decode: Decode
    ) -> None:
        self.hidden, self.packed, self.needs, self.decode = hidden, packed, needs, decode
        floats, width = (hidden, packed.scales, packed.basis, packed.offset), hidden.shape[1]
        wide: list[Any] = [
            each if each is None else each.to(accumulation_dtype(each.dtype)) for each in floats
        ]
        _, self.wide_scales, self.wide_basis, _ = wide
        self.sums: list[Any] = [
            torch.zeros_like(each) if needed else hidden.new_empty(shape)
            for each, needed, shape in zip(wide, needs, ((0, width), (0,), (0, width), (0,)), strict=True)
        ]
        tiers = packed.tiers
        self.width = GROUP * (tiers.shape[1] - 1)
        # With no tier in the basis the rows that are decoded are the values of the codes.
        self.of_values: tuple[Tensor, ...] = (
            packed.records,
            packed.directory,
            torch.cat([torch.zeros_like(tiers[:, :1]), tiers[:, 1:]], 1),
            packed.levels,
        )
        rows = len(packed.scales)
        self.in_basis = tiers[:, 0].bool()[tiers_of_rows(packed.directory)[:rows].long()]

    def add(
        self, ids: Tensor, columns: Tensor, rows: Tensor | None = None, totals: Tensor | None = None
    ) -> None:
        """Add the gradient (N, ids) of the logits of some rows; products are in the dtype of hidden.

        ``rows`` are the decoded rows and ``totals`` (N,) the sums of the gradient by state, where known.
        """
        records, directory, tiers, levels, scales, basis, offset = self.packed
        codes, H, sums = (records, directory, tiers, levels), self.hidden.shape[1], self.sums
        needs_hidden, needs_scales, needs_basis, needs_offset = self.needs
        narrow = columns.to(self.hidden.dtype)
        if needs_hidden:
            rows = self.decode(ids, *codes, scales, basis, offset, H, 1.0) if rows is None else rows
            sums[0] += narrow @ rows.to(narrow.dtype)
        if needs_offset:  # The gradients of a state may cancel, and so are summed first.
            totals = columns.sum(1, dtype=sums[3].dtype) if totals is None else totals.to(sums[3].dtype)
            sums[3] += totals @ self.hidden.to(sums[3].dtype)
        if not (needs_scales or needs_basis):
            return
        upstream = (narrow.t() @ self.hidden).to(self.wide_scales.dtype)  # The gradient of the rows.
        if needs_scales:
            ones = torch.ones_like(self.wide_scales)
            unscaled = self.decode(ids, *codes, ones, self.wide_basis, None, H, 1.0)
            sums[1][ids] = (unscaled * upstream).sum(1)
        if needs_basis:
            size = min(len(self.wide_basis), self.width)
            values = self.decode(ids, *self.of_values, self.wide_scales, None, None, self.width, 1.0)
            coefficients = values[:, :size] * self.in_basis[ids].unsqueeze(1)
            sums[2][:size] += coefficients.t() @ upstream

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums; those that are not needed are empty."""
        dtype = sums_dtype(self.hidden, self.packed.scales)
        of_hidden, of_scales, of_basis, of_offset = (each.to(dtype) for each in self.sums)
        return of_hidden, of_scales, of_basis, of_offset


def _pieces(scales: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.arange(len(scales), device=scales.device).split(PIECE_ROWS)
    return pieces
