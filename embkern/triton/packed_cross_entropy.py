"""packed_cross_entropy in Triton: the kernels of `cross_entropy` over rows from those of `gather_decode`.

    states = hidden, rows = a piece of the table, in the dtype of scales

No more than a piece of the rows is decoded at a time, and no more than a piece of the gradients of the logits
is in memory: they are multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..ops.packed_format import PackedTensors
from ..ops.reference import sums_dtype
from ..ops.reference.cross_entropy import Head, LossOptions, pieces
from ..ops.reference.numerics import autocast_off
from ..ops.reference.packed_logits import PIECE_ROWS, PackedGradients
from .cross_entropy.fold import fold
from .cross_entropy.gradients import Upstream, logit_gradients
from .gather_decode import gather_decode_forward


@autocast_off
def packed_cross_entropy_forward(
    hidden: Tensor,
    labels: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), statistics (N, 3), and the gradient of the losses' sum by hidden, if needed."""
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset).contiguous()
    options = LossOptions(ignore_index, label_smoothing, softcap)
    dtype = sums_dtype(hidden, scales)
    with torch.cuda.device_of(scales):
        head = _head(hidden, labels, len(scales), bias, options)
        ranges = (
            (first, min(len(scales), first + PIECE_ROWS)) for first in range(0, len(scales), PIECE_ROWS)
        )
        losses, statistics = fold(
            head, ((first, rows) for first, _, rows in _decoded(packed, hidden, ranges))
        )
        of_hidden = hidden.new_empty(0, hidden.shape[1], dtype=dtype)
        if needs_hidden:
            needs = (True, False, False, False)
            of_hidden = _backward(head, packed, torch.ones_like(losses), statistics, needs, False)[0]
    return losses.to(dtype), statistics.to(dtype), of_hidden


@autocast_off
def packed_cross_entropy_backward(
    grad: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    labels: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs_hidden: bool,
    needs_scales: bool,
    needs_basis: bool,
    needs_offset: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, scales, basis, offset and bias; one that is not needed is empty."""
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset).contiguous()
    options = LossOptions(ignore_index, label_smoothing, softcap)
    needs = (needs_hidden, needs_scales, needs_basis, needs_offset)
    with torch.cuda.device_of(scales):
        head = _head(hidden, labels, len(scales), bias, options)
        return _backward(head, packed, grad, statistics, needs, needs_bias)


def _backward(
    head: Head,
    packed: PackedTensors,
    grad: Tensor,
    statistics: Tensor,
    needs: tuple[bool, bool, bool, bool],
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, vocabulary = head.states, len(packed.scales)
    upstream = Upstream.of(head, grad, statistics)
    sums = PackedGradients(hidden, packed, needs, gather_decode_forward)
    of_bias = upstream.values.new_empty(vocabulary if needs_bias else 0)
    for first, ids, rows in _decoded(packed, hidden, pieces(vocabulary, hidden)):
        gradients, by_state, by_row = logit_gradients(upstream, first, rows)
        if needs_bias:
            of_bias[first : first + len(ids)] = by_row
        sums.add(ids, gradients, rows, by_state)
    return *sums.results(), of_bias.to(sums_dtype(hidden, packed.scales))


def _head(hidden: Tensor, labels: Tensor, vocabulary: int, bias: Tensor | None, options: LossOptions) -> Head:
    bias = None if bias is None else bias.contiguous()
    return Head(hidden.contiguous(), labels, vocabulary, None, bias, options)


def _decoded(
    packed: PackedTensors, hidden: Tensor, ranges: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    for first, last in ranges:
        ids = torch.arange(first, last, device=packed.scales.device)
        yield first, ids, gather_decode_forward(ids, *packed, hidden.shape[1], 1.0)
