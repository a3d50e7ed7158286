"""low_rank_cross_entropy in Triton: the kernels of `cross_entropy` over the codes, in r columns.

states = hidden @ basis.T, constant = hidden @ offset, rows = codes
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.reference.cross_entropy import Head, LossOptions, pieces
from ..ops.reference.numerics import autocast_off
from .cross_entropy.fold import fold
from .cross_entropy.gradients import Upstream, gradient, is_fused, logit_gradients


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
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and statistics (N, 3), those of reference.low_rank_cross_entropy_forward."""
    options = LossOptions(ignore_index, label_smoothing, softcap)
    with torch.cuda.device_of(codes):
        head = _head(hidden, labels, codes, basis, offset, bias, options)
        return fold(head, [(0, codes.contiguous())])


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
    with torch.cuda.device_of(codes):
        head = _head(hidden, labels, codes, basis, offset, bias, options)
        upstream, codes = Upstream.of(head, grad, statistics), codes.contiguous()
        if not (len(hidden) and is_fused(head.states)):
            return _by_pieces(upstream, codes, needs_codes, needs_bias)
        of_states, of_constant = gradient(upstream, codes, True, statistics.dtype)
        of_codes, of_bias = codes.new_empty(0), statistics.new_empty(0)
        if needs_codes or needs_bias:
            both = gradient(upstream, codes, False, codes.dtype)
            of_codes = both[0] if needs_codes else of_codes
            of_bias = both[1] if needs_bias else of_bias
        return of_states, of_constant, of_codes, of_bias


def _by_pieces(
    upstream: Upstream, codes: Tensor, needs_codes: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same of states that _gradient_kernel does not take."""
    states = upstream.head.states
    of_states = torch.zeros_like(states, dtype=upstream.values.dtype)
    of_constant = upstream.values.new_zeros(len(states))
    of_codes = codes.new_empty(codes.shape if needs_codes else (0,))
    of_bias = upstream.values.new_empty(len(codes) if needs_bias else 0)
    for first, last in pieces(len(codes), states):
        rows = codes[first:last]
        gradients, by_state, by_row = logit_gradients(upstream, first, rows)
        of_constant += by_state
        of_states += gradients @ rows.to(gradients.dtype)
        if needs_bias:
            of_bias[first:last] = by_row
        if needs_codes:
            of_codes[first:last] = gradients.t() @ states
    return of_states, of_constant, of_codes, of_bias


def _head(
    hidden: Tensor,
    labels: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    options: LossOptions,
) -> Head:
    constant = None if offset is None else hidden @ offset.to(hidden.dtype)
    bias = None if bias is None else bias.contiguous()
    return Head(hidden @ basis.to(hidden.dtype).t(), labels, len(codes), constant, bias, options)
