"""Definition of quantize_trellis: Viterbi's algorithm over the windows of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packed_codes import GROUP, STEP_BITS, WINDOW_BITS, lanes, levels_of_windows

_WINDOWS, _CHOICES = 2**WINDOW_BITS, 2**STEP_BITS
_MOST_BEFORE = 64  # steps on either side of the ring's end in the pass that finds the window there


class _Step(NamedTuple):
    """The columns of the values of a step, one or two, and their levels (values, further bits, 4096)."""

    columns: list[int]
    levels: Tensor


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
    steps = _steps(bits.tolist(), [each.to(values.dtype) for each in levels_of_windows(levels)])
    best = torch.full_like(values[:, 0], -torch.inf)
    chosen = torch.zeros_like(best)
    codes = values.new_zeros((len(values) if needs_codes else 0, values.shape[1]), dtype=torch.uint8)
    for scale in scales.t():
        scaled = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(1) * values
        code, y = _nearest(scaled, squares, steps)
        dot, square = (values * y) @ squares, (y.square() @ squares).clamp_min(1e-30)
        projection = dot / square.sqrt()
        better = projection > best
        best = torch.where(better, projection, best)
        chosen = torch.where(better, dot / square, chosen)
        if needs_codes:
            codes[better] = code[better]
    return codes, chosen, best


def _steps(bits: list[int], levels: list[Tensor]) -> list[_Step]:
    """Return the steps of a ring through groups of ``bits``, in the order of the stream."""
    lane, steps = lanes(), []
    for group, width in enumerate(bits):
        if width:
            step_of = lane.pair_step if width == 1 else lane.step
            for step in range(int(step_of.max()) + 1):
                columns = torch.nonzero(step_of == step).flatten() + GROUP * group
                own = levels[width - 1]
                steps.append(_Step(columns.tolist(), own.unsqueeze(1) if width == 1 else own.unsqueeze(0)))
    return steps


def _nearest(x: Tensor, squares: Tensor, steps: list[_Step]) -> tuple[Tensor, Tensor]:
    """Return the codes (N, 32 G) uint8 whose path through all steps is the best, and what they decode to.

    A window has the codes of later steps above its own, so the search goes from the last step to the first. A
    path has to end in the window in which it begins. A first pass without this condition, over the steps on
    either side of the ring's end, gives that window.
    """
    codes, decoded = torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(x)
    if not steps:
        return codes, decoded
    order = list(reversed(range(len(steps))))
    before = min(len(steps) // 2, _MOST_BEFORE)
    around = (order + order)[len(order) - before :][: min(len(steps), 2 * _MOST_BEFORE)]
    free = x.new_zeros(len(x), _WINDOWS)
    boundary = _path(x, squares, [steps[each] for each in around], free, None)[:, before - 1]
    closed = torch.full_like(free, torch.inf).scatter(1, boundary.unsqueeze(1), 0)
    path = _path(x, squares, [steps[each] for each in order], closed, boundary)
    for window, each in zip(path.t(), order, strict=True):
        step = steps[each]
        errors = _errors(x, squares, step, step.levels[:, :, window].permute(2, 0, 1))
        further = errors.argmin(1)
        own = window % _CHOICES
        for place, column in enumerate(step.columns):
            codes[:, column] = own >> place & 1 if len(step.columns) > 1 else own + _CHOICES * further
            decoded[:, column] = step.levels[place, further, window]
    return codes, decoded


def _errors(x: Tensor, squares: Tensor, step: _Step, levels: Tensor) -> Tensor:
    """Return the weighted squared errors (N, ...) of levels (N or 1, values, ...), summed over the values."""
    shape = (-1, len(step.columns)) + (1,) * (levels.dim() - 2)
    errors = squares[step.columns].view(shape) * (x[:, step.columns].view(shape) - levels).square()
    return errors.sum(1)


def _path(x: Tensor, squares: Tensor, steps: list[_Step], cost: Tensor, end: Tensor | None) -> Tensor:
    """Windows (N, steps) of the cheapest paths, given costs (N, 4096) at their start and the last window."""
    parents, dropped = _WINDOWS // _CHOICES, []
    for step in steps:
        best, which = cost.view(len(x), _CHOICES, parents).min(1)
        error = _errors(x, squares, step, step.levels.unsqueeze(0)).amin(1)
        cost = error + best.repeat_interleave(_CHOICES, 1)
        dropped.append(which.to(torch.uint8))
    window = cost.argmin(1) if end is None else end
    windows = []
    for which in reversed(dropped):
        windows.append(window)
        kept = window // _CHOICES
        window = which.gather(1, kept.unsqueeze(1)).squeeze(1).long() * parents + kept
    return torch.stack(windows[::-1], 1)
