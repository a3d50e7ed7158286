"""Definition of packed_cross_entropy and its gradients, a piece of the table at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..packed_format import PackedTensors
from .cross_entropy import Head, LossOptions, fold, logit_gradients, pieces
from .gather_decode import gather_decode_forward
from .numerics import autocast_off, sums_dtype, widened_on_cpu
from .packed_logits import Decode, PackedGradients


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
    decode: Decode = gather_decode_forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), statistics (N, 3), and the gradient of the losses' sum by hidden, if needed.

    ``F.cross_entropy(softcap * tanh((hidden @ rows.T + bias) / softcap), labels, reduction="none")``
    """
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
    options = LossOptions(ignore_index, label_smoothing, softcap)
    hidden = widened_on_cpu(hidden)
    head = Head(hidden, labels, len(scales), None, bias, options)
    rows = ((first, piece) for first, _, piece in _decoded(packed, hidden, decode))
    losses, statistics, of_hidden, _ = fold(head, rows, needs_hidden)
    dtype = sums_dtype(hidden, scales)
    return losses.to(dtype), statistics.to(dtype), of_hidden.to(dtype).view(-1, hidden.shape[1])


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
    decode: Decode = gather_decode_forward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, scales, basis, offset and bias; one that is not needed is empty."""
    packed = PackedTensors(records, directory, tiers, levels, scales, basis, offset)
    options = LossOptions(ignore_index, label_smoothing, softcap)
    hidden = widened_on_cpu(hidden)
    head = Head(hidden, labels, len(scales), None, bias, options)
    needs = (needs_hidden, needs_scales, needs_basis, needs_offset)
    sums = PackedGradients(hidden, packed, needs, decode)
    dtype = sums_dtype(hidden, scales)
    of_bias = [scales.new_empty(0, dtype=dtype)]
    for first, ids, rows in _decoded(packed, hidden, decode):
        gradients = logit_gradients(head, rows, first, grad, statistics)
        if needs_bias:
            of_bias.append(gradients.sum(0).to(dtype))
        sums.add(ids, gradients)
    return *sums.results(), torch.cat(of_bias)


def _decoded(packed: PackedTensors, hidden: Tensor, decode: Decode) -> Iterator[tuple[int, Tensor, Tensor]]:
    for first, last in pieces(len(packed.scales), hidden):
        ids = torch.arange(first, last, device=packed.scales.device)
        yield first, ids, decode(ids, *packed, hidden.shape[1], 1.0)
