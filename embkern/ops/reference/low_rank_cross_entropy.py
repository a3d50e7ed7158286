"""Definition of low_rank_cross_entropy and its gradients, a piece of the codes at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cross_entropy import Head, LossOptions, fold, logit_gradients, pieces
from .numerics import autocast_off, widened_on_cpu


@autocast_off
def low_rank_cross_entropy_forward(
    hidden: Tensor,
    labels: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), statistics (N, 3), and gradients of the losses' sum, if needed.

    ``F.cross_entropy(softcap * tanh((hidden @ (codes @ basis + offset).T + bias) / softcap), labels,
    reduction="none")``. The gradients are those of ``hidden @ basis.T`` (N, r) and ``hidden @ offset`` (N,).
    """
    options = LossOptions(ignore_index, label_smoothing, softcap)
    head = _head(hidden, labels, codes, basis, offset, bias, options)
    return fold(head, _pieces(codes, hidden), needs_sums)


@autocast_off
def low_rank_cross_entropy_backward(
    grad: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    labels: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs_codes: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``hidden @ basis.T`` (N, r), ``hidden @ offset`` (N,), and, if needed, codes and bias."""
    options = LossOptions(ignore_index, label_smoothing, softcap)
    head = _head(hidden, labels, codes, basis, offset, bias, options)
    of_projected = torch.zeros_like(head.states, dtype=statistics.dtype)
    of_constant = torch.zeros_like(statistics[:, 0])
    of_bias, of_codes = [statistics.new_empty(0)], codes.new_empty(codes.shape if needs_codes else (0,))
    for first, rows in _pieces(codes, hidden):
        gradients = logit_gradients(head, rows, first, grad, statistics)
        of_constant += gradients.sum(1)
        if needs_bias:
            of_bias.append(gradients.sum(0))
        gradients = gradients.to(head.states.dtype)
        of_projected += gradients @ rows.to(gradients.dtype)
        if needs_codes:
            of_codes[first : first + len(rows)] = (gradients.t() @ head.states).to(codes.dtype)
    return of_projected, of_constant, of_codes, torch.cat(of_bias)


@autocast_off
def low_rank_gradients(
    of_projected: Tensor,
    of_constant: Tensor,
    hidden: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, basis and offset from those of ``hidden @ basis.T`` and ``hidden @ offset``."""
    hidden, dtype = widened_on_cpu(hidden), hidden.dtype
    of_hidden = of_basis = of_offset = None
    if needs[0]:
        of_hidden = of_projected.to(hidden.dtype) @ basis.to(hidden.dtype)
        if offset is not None:
            of_hidden = of_hidden + of_constant.unsqueeze(1) * offset.to(of_constant.dtype)
        of_hidden = of_hidden.to(dtype)
    if needs[1]:
        of_basis = (of_projected.to(hidden.dtype).t() @ hidden).to(basis.dtype)
    if needs[2] and offset is not None:
        of_offset = (of_constant @ hidden.to(of_constant.dtype)).to(offset.dtype)
    return of_hidden, of_basis, of_offset


def _head(
    hidden: Tensor,
    labels: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    options: LossOptions,
) -> Head:
    hidden = widened_on_cpu(hidden)
    constant = None if offset is None else hidden @ offset.to(hidden.dtype)
    return Head(hidden @ basis.to(hidden.dtype).t(), labels, len(codes), constant, bias, options)


def _pieces(codes: Tensor, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first, last in pieces(len(codes), hidden):
        yield first, codes[first:last]
