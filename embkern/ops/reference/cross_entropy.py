"""The cross-entropy of a head whose rows come in pieces, so that no (N, V) logits are held.

The logits of a piece are folded into the running maximum and sum of exponentials of each hidden state. The
exponential of the label is left out of the sum: where a prediction is nearly certain, loss and gradient then
follow from what remains without cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import accumulation_dtype, autocast_off, widened_on_cpu

# A piece has as many rows as make up this number of logits, within bounds. On a CPU they stay in the cache
# (8 MB in fp32); on a GPU fewer would be bound by launches.
MOST_LOGITS, MOST_LOGITS_OF_A_GPU = 1 << 21, 1 << 24
MOST_ROWS, FEWEST_ROWS, COMPILED_ROWS = 16384, 256, 4096
STATISTICS = 3  # Per state: the largest logit, the log of the sum of exp(logit - largest), -log p(label).


class LossOptions(NamedTuple):
    """What turns logits and labels into losses; a softcap of 0 is none."""

    ignore_index: int
    label_smoothing: float
    softcap: float


class Head(NamedTuple):
    """A head with logits ``states @ rows.T + constant[:, None] + bias``: states (N, k), rows (V, k)."""

    states: Tensor
    labels: Tensor
    vocabulary: int
    constant: Tensor | None
    bias: Tensor | None
    options: LossOptions

    def logits(self, rows: Tensor, first: int) -> Tensor:
        """Return the logits of consecutive rows in the dtype of sums."""
        logits = (self.states @ rows.to(self.states.dtype).t()).to(accumulation_dtype(self.states.dtype))
        if self.constant is not None:
            logits += self.constant.to(logits.dtype).unsqueeze(1)
        if self.bias is not None:
            logits += self.bias[first : first + len(rows)].to(logits.dtype)
        cap = self.options.softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def slopes(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of capped logits by those without cap; None if there is no cap."""
        cap = self.options.softcap
        return (1 - logits / cap) * (1 + logits / cap) if cap else None

    def ignored(self) -> Tensor:
        """Return which states count for nothing."""
        return self.labels == self.options.ignore_index

    def labels_within(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return whether each label is among rows first to first + count, and where, both (N, 1)."""
        here = (self.labels >= first) & (self.labels < first + count) & ~self.ignored()
        return here.unsqueeze(1), (self.labels - first).clamp(0, count - 1).long().unsqueeze(1)


def pieces(vocabulary: int, states: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first row and the one after the last of each piece of a table."""
    if torch.compiler.is_compiling():  # The number of states is unknown, and must not be guarded.
        size = COMPILED_ROWS
    else:
        most = MOST_LOGITS if states.is_cpu else MOST_LOGITS_OF_A_GPU
        size = max(FEWEST_ROWS, min(MOST_ROWS, most // max(1, len(states))))
    for first in range(0, vocabulary, size):
        yield first, min(vocabulary, first + size)


def fold(
    head: Head, rows: Iterable[tuple[int, Tensor]], needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), statistics (N, 3), and of the losses' sum the gradients of states (N, k), constant (N,).

    ``rows`` are pieces of the table with the number of their first row. Those gradients are empty unless they
    are needed, and for a label smoothing of 0.
    """
    dtype = accumulation_dtype(head.states.dtype)
    shift = head.states.new_full((len(head.states),), -math.inf, dtype=dtype)
    rest, label_logit, total, slope_sum = (torch.zeros_like(shift) for _ in range(4))
    label_rows = head.states.new_empty(0)
    sums = head.states.new_empty(0, dtype=dtype)
    if needs_sums:
        sums = torch.zeros_like(head.states, dtype=dtype)
        label_rows = torch.zeros_like(sums)
    for first, piece in rows:
        logits = head.logits(piece, first)
        here, place = head.labels_within(first, len(piece))
        label_logit = torch.where(here.squeeze(1), logits.gather(1, place).squeeze(1), label_logit)
        largest = torch.maximum(shift, logits.amax(1))
        factor = (shift - _finite(largest)).exp()
        shift = largest
        if head.options.label_smoothing:
            total = total + logits.sum(1)
        slopes = head.slopes(logits) if needs_sums else None
        values = logits.sub_(_finite(shift).unsqueeze(1)).exp_()
        values.scatter_(1, place, values.gather(1, place).masked_fill(here, 0))
        rest = rest * factor + values.sum(1)
        if not needs_sums:
            continue
        if slopes is not None:
            values *= slopes
        sums = sums * factor.unsqueeze(1) + (values.to(head.states.dtype) @ piece.to(head.states.dtype)).to(
            dtype
        )
        slope_sum = slope_sum * factor + values.sum(1)
        label_rows = torch.where(here, piece[place.squeeze(1)].to(dtype), label_rows)
    losses, statistics, rest, label = finished(head, shift, rest, label_logit, total)
    of_constant = sums.new_empty(0)
    if needs_sums:
        ignored = head.ignored()
        label_slope = head.slopes(label_logit)
        of_label = -rest / (rest + label) * (1 if label_slope is None else label_slope)
        of_constant = (slope_sum / (rest + label) + of_label).masked_fill(ignored, 0)
        sums = sums / (rest + label).unsqueeze(1) + of_label.unsqueeze(1) * label_rows
        sums = sums.masked_fill(ignored.unsqueeze(1), 0)
    return losses, statistics, sums, of_constant


def finished(
    head: Head, shift: Tensor, rest: Tensor, label_logit: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), statistics (N, 3), ``rest`` and ``exp(label_logit - shift)`` of states after all rows.

    All arguments are (N,): the largest logit, the sum of ``exp(logit - shift)`` without the label's, the
    label's logit, and the sum of the logits, which is read for label smoothing.
    """
    rest = torch.where(shift == -math.inf, math.nan, rest)  # All logits are -inf.
    label, below = (label_logit - shift).exp(), shift - label_logit
    log_sum = (rest + label).log()
    surprise = torch.where(below < 30, (rest / label).log1p(), below + log_sum)
    losses, smoothing = surprise, head.options.label_smoothing
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (shift + log_sum - total / head.vocabulary)
    ignored = head.ignored()
    statistics = torch.stack([shift, log_sum, surprise], 1).masked_fill(ignored.unsqueeze(1), 0)
    return losses.masked_fill(ignored, 0), statistics, rest, label


def logit_gradients(head: Head, piece: Tensor, first: int, grad: Tensor, statistics: Tensor) -> Tensor:
    """Return the gradients (N, rows) of a piece's logits before the cap, for ``grad`` (N,) of the losses."""
    logits = head.logits(piece, first)
    shift, log_sum, surprise = statistics.unbind(1)
    upstream = grad.to(logits.dtype).masked_fill(head.ignored(), 0).unsqueeze(1)
    smoothing, uniform = head.options.label_smoothing, head.options.label_smoothing / head.vocabulary
    slopes = head.slopes(logits)
    gradients = logits.sub_(shift.unsqueeze(1)).exp_().mul_(upstream * (-log_sum).exp().unsqueeze(1))
    gradients -= upstream * uniform
    here, place = head.labels_within(first, len(piece))
    of_label = upstream * ((-surprise).expm1().unsqueeze(1) + smoothing - uniform)
    of_label = torch.where(here, of_label.to(gradients.dtype), gradients.gather(1, place))
    gradients.scatter_(1, place, of_label)
    gradients = gradients if slopes is None else gradients.mul_(slopes)
    return gradients.masked_fill_(head.ignored().unsqueeze(1), 0)  # whose logits may have any size


@autocast_off
def dense_losses(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions
) -> Tensor:
    """Return the losses (N,) of a head with a dense table (V, H), by pieces of it; without gradient."""
    with torch.no_grad():
        head = Head(widened_on_cpu(hidden), labels, len(weight), None, bias, options)
        rows = ((first, weight[first:last]) for first, last in pieces(len(weight), hidden))
        return fold(head, rows, False)[0]


def _finite(shift: Tensor) -> Tensor:
    """Return a shift that leaves exp(-inf) at 0."""
    return torch.where(shift == -math.inf, 0, shift)
