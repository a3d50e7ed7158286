"""Definition of quantize_trellis: Viterbi's algorithm over the states of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed_format import GROUP, LEVEL_STEP, STATES


def quantize_trellis(
    values: Tensor,
    spread: Tensor | None,
    bits: Tensor,
    levels: Tensor,
    scales: Tensor,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Trellis codes, scales and projections of rows (N, 32 G), at the best of their scales (N, F)."""
    squares = values.new_ones(values.shape[1]) if spread is None else spread.square()
    best = torch.full_like(values[:, 0], -torch.inf)
    chosen = torch.zeros_like(best)
    codes = values.new_zeros((len(values) if needs_codes else 0, values.shape[1]), dtype=torch.uint8)
    for scale in scales.t():
        scaled = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(1) * values
        code, decoded = [], []
        for width, x, weights in zip(
            bits.tolist(), scaled.split(GROUP, 1), squares.split(GROUP), strict=True
        ):
            own = levels[max(width, 1) - 1].to(values.dtype) * LEVEL_STEP
            states = _best_states(x, weights, own, width) if width else torch.zeros_like(x, dtype=torch.int64)
            code.append(states % 2**width)
            decoded.append(own[states] if width else torch.zeros_like(x))
        y = torch.cat(decoded, 1)
        dot, square = (values * y) @ squares, (y.square() @ squares).clamp_min(1e-30)
        projection = dot / square.sqrt()
        better = projection > best
        best = torch.where(better, projection, best)
        chosen = torch.where(better, dot / square, chosen)
        if needs_codes:
            codes[better] = torch.cat(code, 1).to(torch.uint8)[better]
    return codes, chosen, best


def _best_states(x: Tensor, weights: Tensor, levels: Tensor, bits: int) -> Tensor:
    """States (N, 32) of the paths whose levels are nearest to x (N, 32), by Viterbi's algorithm.

    A path has to end in the state in which it begins. That state is estimated: a path without this condition,
    of the group rotated by half, passes through it in its middle.
    """
    half = GROUP // 2
    free = x.new_zeros(len(x), STATES)
    boundary = _path(x.roll(half, 1), weights.roll(half), levels, bits, free, None)[:, half - 1]
    closed = torch.full_like(free, torch.inf).scatter(1, boundary.unsqueeze(1), 0)
    return _path(x, weights, levels, bits, closed, boundary)


def _path(x: Tensor, weights: Tensor, levels: Tensor, bits: int, cost: Tensor, end: Tensor | None) -> Tensor:
    """States (N, 32) of the cheapest paths, given costs (N, 128) of the first states, and the last state."""
    parents, dropped = STATES >> bits, []
    for value, weight in zip(x.t(), weights.tolist(), strict=True):
        best, which = cost.view(len(x), 1 << bits, parents).min(1)
        error = weight * (value.unsqueeze(1) - levels).square()
        cost = error + best.repeat_interleave(1 << bits, 1)
        dropped.append(which)
    state = cost.argmin(1) if end is None else end
    states = []
    for which in reversed(dropped):
        states.append(state)
        kept = state >> bits
        state = which.gather(1, kept.unsqueeze(1)).squeeze(1) * parents + kept
    return torch.stack(states[::-1], 1)
