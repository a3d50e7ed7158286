"""Definition of quantize_trellis: Viterbi's algorithm over the windows of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packed_codes import GROUP, STEP_BITS, WINDOW_BITS, lanes, levels_of_windows

_WINDOWS, _CHOICES = 2**WINDOW_BITS, 2**STEP_BITS
_ROWS = 32  # whose costs fit into a cache of L2
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
        parts = [_nearest(part, squares, steps) for part in scaled.split(_ROWS)]
        code, y = (torch.cat(each) for each in zip(*parts, strict=True))
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
    roots = squares.sqrt()
    targets = x * roots
    free = x.new_zeros(len(x), _WINDOWS)
    boundary = _path(targets, roots, [steps[each] for each in around], free, None)[:, before - 1]
    closed = torch.full_like(free, torch.inf).scatter(1, boundary.unsqueeze(1), 0)
    path = _path(targets, roots, [steps[each] for each in order], closed, boundary)
    for window, each in zip(path.t(), order, strict=True):
        step = steps[each]
        further, own = _further(targets, roots, step, window), window % _CHOICES
        for place, column in enumerate(step.columns):
            codes[:, column] = own >> place & 1 if len(step.columns) > 1 else own + _CHOICES * further
            decoded[:, column] = step.levels[place, further, window]
    return codes, decoded


def _further(targets: Tensor, roots: Tensor, step: _Step, window: Tensor) -> Tensor:
    """Return the further bits (N,) with the levels nearest to the targets of a step at a window (N,)."""
    levels = step.levels[:, :, window] * roots[step.columns].view(-1, 1, 1)  # (values, further bits, N)
    return (levels - targets[:, step.columns].t().unsqueeze(1)).square().sum(0).argmin(0)


def _errors(targets: Tensor, roots: Tensor, step: _Step) -> Tensor:
    """Return the squared errors (N, 4096) of the windows of a step, with the best further bits."""
    errors: Tensor | None = None
    for column, levels in zip(step.columns, step.levels, strict=True):
        found: Tensor | None = None
        for each in levels * roots[column]:
            error = (each - targets[:, column : column + 1]).square_()
            found = error if found is None else torch.minimum(found, error, out=found)
        assert found is not None
        errors = found if errors is None else errors.add_(found)
    assert errors is not None
    return errors


def _path(targets: Tensor, roots: Tensor, steps: list[_Step], cost: Tensor, end: Tensor | None) -> Tensor:
    """Windows (N, steps) of the cheapest paths, given costs (N, 4096) at their start and the last window."""
    parents, dropped = _WINDOWS // _CHOICES, []
    for step in steps:
        best, which = _least(cost.view(len(targets), _CHOICES, parents))
        cost = _errors(targets, roots, step)
        cost.view(-1, parents, _CHOICES).add_(best.unsqueeze(2))
        dropped.append(which)
    window = cost.argmin(1) if end is None else end
    windows = []
    for which in reversed(dropped):
        windows.append(window)
        kept = window // _CHOICES
        window = which.gather(1, kept.unsqueeze(1)).squeeze(1).long() * parents + kept
    return torch.stack(windows[::-1], 1)


def _least(cost: Tensor) -> tuple[Tensor, Tensor]:
    """``cost.min(1)`` of costs (N, 4, P), with places of uint8, in a third of the time."""
    first, second = cost[:, 1] < cost[:, 0], cost[:, 3] < cost[:, 2]
    low, high = torch.minimum(cost[:, 0], cost[:, 1]), torch.minimum(cost[:, 2], cost[:, 3])
    which = torch.where(high < low, second.to(torch.uint8) + 2, first.to(torch.uint8))
    return torch.minimum(low, high), which
