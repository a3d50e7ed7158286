"""Definition of quantize_trellis: Viterbi's algorithm over the windows of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packed_codes import GROUP, STEP_BITS, WINDOW_BITS, lanes, levels_of_windows

_WINDOWS, _CHOICES = 2**WINDOW_BITS, 2**STEP_BITS
_STATES = _WINDOWS // _CHOICES
_ROWS = 32  # whose costs fit into a cache of L2
_BEFORE, _LEAST = 48, 64  # steps that the search goes before the path begins, and at least goes then


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

    A window has the codes of later steps above its own, so the search goes from the last step to the first.
    What earlier steps see of it, all but its highest bits, is its state. A path has to end in the state in
    which it begins. The best path without this condition begins in a state after some steps, and mostly ends
    in it when the search has gone around the ring from there; if not, a search from this state alone does.
    """
    codes, decoded = torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(x)
    if not steps:
        return codes, decoded
    roots, count = squares.sqrt(), len(steps)
    targets = x * roots
    order = [steps[count - 1 - i % count] for i in range(_BEFORE + max(count, _LEAST))]
    ring = order[_BEFORE:][:count]
    cost, _ = _search(targets, roots, order[:_BEFORE], x.new_zeros(len(x), _STATES))
    cost, dropped = _search(targets, roots, order[_BEFORE:], cost)
    state = _trace(dropped, cost.argmin(1))[1]
    path, beginning = _trace(dropped[:count], state)
    rest = beginning != state
    if rest.any():
        alone = x.new_full((int(rest.sum()), _STATES), torch.inf).scatter(1, state[rest].unsqueeze(1), 0)
        _, dropped = _search(targets[rest], roots, ring, alone)
        path[rest] = _trace(dropped, state[rest])[0]
    for window, step in zip(path.t(), ring, strict=True):
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


def _search(targets: Tensor, roots: Tensor, steps: list[_Step], cost: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Extend the cheapest paths to each state, given their costs (N, 1024).

    Returns:
        costs (N, 1024); for each step the highest bits (N, 1024) of the windows of the paths to each state.
    """
    dropped = []
    for step in steps:
        errors = _errors(targets, roots, step)
        errors.view(-1, _STATES, _CHOICES).add_(cost.unsqueeze(2))
        cost, which = _least(errors.view(-1, _CHOICES, _STATES))
        dropped.append(which)
    return cost, dropped


def _trace(dropped: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows (N, steps) of the paths that end in states (N,), and the states before them."""
    windows = []
    for which in reversed(dropped):
        windows.append(which.gather(1, state.unsqueeze(1)).squeeze(1).long() * _STATES + state)
        state = windows[-1] // _CHOICES
    return torch.stack(windows[::-1], 1), state


def _least(cost: Tensor) -> tuple[Tensor, Tensor]:
    """``cost.min(1)`` of costs (N, 4, P), with places of uint8, in a third of the time."""
    first, second = cost[:, 1] < cost[:, 0], cost[:, 3] < cost[:, 2]
    low, high = torch.minimum(cost[:, 0], cost[:, 1]), torch.minimum(cost[:, 2], cost[:, 3])
    which = torch.where(high < low, second.to(torch.uint8) + 2, first.to(torch.uint8))
    return torch.minimum(low, high), which
