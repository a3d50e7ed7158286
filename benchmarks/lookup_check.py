"""Whether a provider of ``gather_project`` is right, against float64, in each of the modes that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .peers import BACKWARD, FORWARD, PROVIDERS, Lookup, Problem
from .runner import assert_within, relative_error

CHECKED_ROWS = 512
# A check compares at least this many values of the smallest result, over several batches where one has fewer.
# Two equally exact kernels draw different rounding errors: the ratio of the root mean squares of n errors has
# a standard deviation of about n^-1/2. One row of 24 values exceeds a factor of 2 in one run of a hundred; at
# 256 values the factor is seven standard deviations away, even for errors a third larger.
CHECKED_VALUES = 256


def mode_call(mode: str, lookup: Lookup, ids: Tensor, upstream: Tensor | None) -> Callable[[], Any]:
    """Return the call that is timed: rows, their gradients from a kept graph, or both."""
    if mode == FORWARD:
        return lambda: lookup.call(ids)
    if mode == BACKWARD:
        rows = lookup.call(ids)
        return lambda: torch.autograd.grad(rows, lookup.leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(lookup.call(ids), lookup.leaves, upstream)


class Check:
    """The check of a provider against float64, on one batch of ids, or on several small ones."""

    def __init__(self, problem: Problem, ids: Tensor, mode: str) -> None:
        self.problem, self.mode = problem, mode
        values = len(ids) * problem.model.H
        if mode != FORWARD:  # the gradient of the codes or of the offset is the smallest result
            values = min(len(ids.unique()) * problem.codes.shape[1], problem.model.H)
        batches = -(-CHECKED_VALUES // values)
        shape = (len(ids), problem.model.H)
        self.output_bytes = shape[0] * shape[1] * problem.dtype.itemsize
        self.upstream = None
        upstreams: list[Tensor | None] = [None] * batches
        if mode != FORWARD:
            generator = torch.Generator(problem.device).manual_seed(1)
            upstream = torch.randn(shape, generator=generator, device=problem.device)
            self.upstream = upstream.to(problem.dtype)
            upstreams = [self.upstream.roll(k, 1) for k in range(batches)]
        self.batches = [((ids + k) % problem.model.V, each) for k, each in enumerate(upstreams)]
        picked = torch.linspace(0, len(ids) - 1, min(len(ids), CHECKED_ROWS), dtype=torch.float64)
        self.picked = picked.round().long().to(ids.device)
        self.plain: list[float] | None = None

    def __call__(self, lookup: Lookup, allowed_factor: float = 2.0) -> float:
        """Return the largest relative error; raise AssertionError where it exceeds its limit."""
        errors = self._errors(lookup)
        if lookup.own_rows is not None and self.mode == FORWARD:
            allowed = [lookup.tolerance]
        else:
            allowed = [allowed_factor * error + 1e-7 for error in self._plain_errors(lookup)]
        return assert_within(errors, allowed)

    def _plain_errors(self, lookup: Lookup) -> list[float]:
        """Return the errors of plain torch in the same dtype: two steps, or a dense ``F.embedding``."""
        if lookup.own_rows is not None:
            return self._errors(PROVIDERS["dense"].build(self.problem))
        if self.plain is None:
            self.plain = self._errors(PROVIDERS["two-step"].build(self.problem))
        return self.plain

    def _errors(self, lookup: Lookup) -> list[float]:
        """Return the relative error of each result, over all batches together."""
        of_batches = [self._results(lookup, ids, upstream) for ids, upstream in self.batches]
        return [
            relative_error(torch.cat([got for got, _ in each]), torch.cat([exact for _, exact in each]))
            for each in zip(*of_batches, strict=True)
        ]

    def _results(self, lookup: Lookup, ids: Tensor, upstream: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return each result of a provider on a batch, with the exact one."""
        if self.mode == FORWARD:
            rows = lookup.call(ids)
            assert rows.shape == (len(ids), self.problem.model.H), f"shape {tuple(rows.shape)}"
            picked = ids[self.picked]
            exact = lookup.own_rows(picked) if lookup.own_rows else self._exact_rows(picked)
            return [(rows[self.picked], exact)]
        assert upstream is not None
        grads = mode_call(self.mode, lookup, ids, upstream)()
        return list(self._pairs(grads, ids, upstream.double(), dense=lookup.own_rows is not None))

    def _exact_rows(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            codes, basis, offset = (factor.double() for factor in self._gathered(ids))
            return codes @ basis + offset

    def _gathered(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, basis, offset = self.problem.factors
        return codes.detach()[ids], basis.detach(), offset.detach()

    def _pairs(
        self, grads: tuple[Tensor, ...], ids: Tensor, upstream: Tensor, dense: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each gradient with the exact one; of a table only the rows that occur, as others are 0."""
        distinct, position = ids.unique(return_inverse=True)
        codes, basis, _ = (factor.double() for factor in self._gathered(ids))
        per_position = upstream if dense else upstream @ basis.t()
        exact = per_position.new_zeros(len(distinct), per_position.shape[1]).index_add_(
            0, position, per_position
        )
        yield _rows_of(grads[0], distinct), exact
        if not dense:
            yield grads[1], codes.t() @ upstream
            yield grads[2], upstream.sum(0)


def _rows_of(grad: Tensor, distinct: Tensor) -> Tensor:
    """Return rows of a dense or sparse gradient in float64, after checking that all others are zero."""
    if grad.is_sparse:
        ids, values = grad._indices()[0], grad._values()
        position = torch.searchsorted(distinct, ids).clamp_(max=len(distinct) - 1)
        known = distinct[position] == ids
        assert not values[~known].any(), "expected a zero gradient for rows that no id names"
        rows = values.new_zeros(len(distinct), values.shape[1], dtype=torch.float64)
        return rows.index_add_(0, position[known], values[known].double())
    occurs = (grad != 0).any(1)
    occurs[distinct] = False
    assert not occurs.any(), "expected a zero gradient for rows that no id names"
    return grad[distinct].double()
