"""Low-rank factors with Fisher weights: of rows (FWSVD, in closed form) and of single entries (TFWSVD)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..ops import gather_project
from ..tables.factors import Factors, check_rank
from .base import Options, block_rows, check_table, parse_options, training_dtype
from .direction import direction

SMOOTHING = 0.01  # default share of the mean weight that is added to every weight
LEAST = 1e-12  # of the largest column weight: the least by which a basis is divided
FIRST_STEP = 1e-3  # of gradient descent, relative to the size of the factors


class FWSVDOptions(Options):
    """Options of ``fwsvd``."""

    smoothing: float = Field(
        SMOOTHING, ge=0, description="this share of the mean weight is added to every weight"
    )


class TFWSVDOptions(FWSVDOptions):
    """Options of ``tfwsvd``."""

    adam_steps: int = Field(300, ge=0, description="steps of Adam over the whole table")
    lr: float = Field(
        0.1, gt=0, description="Adam's first learning rate, relative to the factors; it falls to 0"
    )
    sgd_steps: int = Field(100, ge=0, description="steps of gradient descent after them")


def fwsvd(table: Tensor, rank: int, *, fisher: Tensor | None = None, **options: Any) -> Factors:
    """Rank-r factors with the least squared error, each row weighted by its Fisher information.

    ``argmin over codes, basis of (w * (table - codes @ basis).square().sum(1)).sum()`` with
    ``w = fisher.sum(1)``, and ``smoothing`` times the mean of w added to it, so that rows that no text has
    read are not neglected. It is ``direction`` with ``cosine_weight=0, mse_weight=1`` and these weights, a
    singular value decomposition of ``w.sqrt().unsqueeze(1) * table``.

    Args:
        table: (V, H).
        rank: r, 1 to H.
        fisher: (V, H) or (V,), from ``fisher_weights`` or ``fisher_row_weights``.
        options: the fields of ``FWSVDOptions``.

    Raises:
        ValueError, TypeError: the rank, an option or a weight is out of range, or the table is not usable.

    Source: Hsu et al. 2022, arXiv 2207.00112.
    """
    chosen = parse_options(FWSVDOptions, options, "fwsvd")
    check_table(table)
    check_rank(rank, table.shape[1])
    _check_weights(fisher, table, "fwsvd", dims=(1, 2))
    assert fisher is not None
    return _closed_form(table, rank, row_fisher(fisher, chosen.smoothing))


def tfwsvd(table: Tensor, rank: int, *, fisher: Tensor | None = None, **options: Any) -> Factors:
    """Rank-r factors with the least squared error, each entry weighted by its Fisher information.

    Local search for the minimum over codes and basis of::

        w = fisher + smoothing * fisher.mean()
        (w * (table - codes @ basis).square()).sum()

    No closed form is known unless w has rank 1. The search starts from the better of ``fwsvd`` and the
    closed form for the rank-1 weights ``w.sum(1, keepdim=True) * w.sum(0) / w.sum()``. Adam, with a learning
    rate that falls in a straight line to 0, is followed by gradient descent, whose step grows after a lower
    error and is halved and repeated after a higher one; each step takes the gradient over the whole table.
    The best factors of all are kept, and the start where none is better after rounding to the table's dtype.
    Columns of codes and rows of the basis are scaled to a mean square of 1 during the search, so that ``lr``
    is a relative change.

    A step reads the table and its weights once and costs three products of (V, H, r). Memory beyond these
    two: a scaled copy of the table for the start, then some ten times the factors, and blocks of rows.

    Args:
        table: (V, H). The search runs in fp32 (float64 for a float64 table) on its device.
        rank: r, 1 to H.
        fisher: (V, H), from ``fisher_weights``.
        options: the fields of ``TFWSVDOptions``.

    Returns:
        Factors in the table's dtype. ``facts`` has ``error``, the weighted squared error over that of a table
        of zeros; ``start_error``, that of the closed form; and ``start``: ``rows`` or ``rank-1``.

    Raises:
        ValueError, TypeError: the rank, an option or a weight is out of range, or the table is not usable.

    Source: Hua et al. 2022, arXiv 2211.09718: entry-wise weights, and Adam before gradient descent. Start,
    schedules and safeguards are embkern's.
    """
    chosen = parse_options(TFWSVDOptions, options, "tfwsvd")
    check_table(table)
    check_rank(rank, table.shape[1])
    _check_weights(fisher, table, "tfwsvd", dims=(2,))
    assert fisher is not None
    with torch.autocast(table.device.type, enabled=False):
        problem = _Problem(table.detach(), fisher.detach(), chosen.smoothing)
        starts = {"rows": _closed_form(table, rank, problem.of_rows())}
        starts["rank-1"] = _closed_form(table, rank, problem.of_rows(), problem.of_columns())
        errors = {name: problem.error(each) for name, each in starts.items()}
        start = min(errors, key=errors.__getitem__)
        best, error = starts[start], errors[start]
        found = _searched(problem, best, chosen)
        if (reached := problem.error(found)) < error:
            best, error = found, reached
    facts = {"error": error, "start_error": errors[start], "start": start}
    return Factors(best.codes, best.basis, facts=facts)


def row_fisher(fisher: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """Return ``w + smoothing * w.mean()`` for the sums w over the rows of ``fisher``: (V,) float64.

    Args:
        fisher: (V, H) or (V,).
        smoothing: the share of the mean that is added.
    """
    rows = fisher.detach()
    rows = rows.double() if rows.dim() == 1 else rows.sum(1, dtype=torch.float64)
    return rows + smoothing * rows.mean()


def _check_weights(fisher: Tensor | None, table: Tensor, method: str, *, dims: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError unless ``fisher`` weighs the rows or entries of a table."""
    shapes = " or ".join(str(tuple(table.shape[:dim])) for dim in sorted(dims, reverse=True))
    if fisher is None:
        raise ValueError(
            f"fisher: method {method!r} expected weights {shapes}, got none; `embkern fisher` or "
            "embkern.fisher_weights measures them"
        )
    if not isinstance(fisher, Tensor):
        raise TypeError(f"fisher: expected a tensor {shapes}, got {type(fisher).__name__}")
    if tuple(fisher.shape) not in [tuple(table.shape[:dim]) for dim in dims]:
        raise ValueError(f"fisher: expected shape {shapes}, as the table, got {tuple(fisher.shape)}")
    if not fisher.dtype.is_floating_point:
        raise TypeError(f"fisher: expected a floating-point dtype, got {fisher.dtype}")
    least, most = (float(each) for each in fisher.detach().aminmax())  # both are NaN if one weight is
    if not (least >= 0 and most < float("inf")):
        raise ValueError(f"fisher: expected finite weights of at least 0, got {least:g} to {most:g}")
    if most == 0:
        raise ValueError("fisher: expected one above 0, got none")


def _closed_form(table: Tensor, rank: int, rows: Tensor, columns: Tensor | None = None) -> Factors:
    """Return the best factors for weights that are the product of row and column weights."""
    options: dict[str, Any] = {"row_weight": rows, "cosine_weight": 0, "mse_weight": 1}
    if columns is None:
        return direction(table, rank, **options)
    root = columns.clamp_min(LEAST * float(columns.max())).sqrt().to(table.device, training_dtype(table))
    scaled = direction(table.detach().to(root.dtype) * root, rank, **options)
    return Factors(scaled.codes.to(table.dtype), (scaled.basis / root).to(table.dtype))


class _Block(NamedTuple):
    """Consecutive rows of a table with their weights, in the dtype of training."""

    first: int
    rows: Tensor
    weights: Tensor


class _Problem:
    """The weighted error of factors of a table, block by block.

    Weights are scaled to a mean of 1 with the smoothing included.
    """

    def __init__(self, table: Tensor, fisher: Tensor, smoothing: float) -> None:
        self.table, self.fisher = table, fisher
        mean = float(fisher.mean(dtype=torch.float64))
        self.added, self.scale = smoothing * mean, mean * (1 + smoothing)
        self.dtype = training_dtype(table)
        self.of_zeros = self._sum(lambda block: block.rows)

    def blocks(self) -> Iterator[_Block]:
        """Yield the rows of the table with their weights."""
        size = block_rows(self.table)
        for first in range(0, len(self.table), size):
            weights = self.fisher[first : first + size].to(self.table.device, self.dtype)
            rows = self.table[first : first + size].to(self.dtype)
            yield _Block(first, rows, (weights + self.added) / self.scale)

    def of_rows(self) -> Tensor:
        """Return the sums of the weights of each row, (V,) float64."""
        return torch.cat([block.weights.sum(1, dtype=torch.float64) for block in self.blocks()])

    def of_columns(self) -> Tensor:
        """Return the sums of the weights of each column, (H,) float64."""
        return torch.stack([block.weights.sum(0, dtype=torch.float64) for block in self.blocks()]).sum(0)

    def error(self, factors: Factors) -> float:
        """Return the weighted squared error of factors as they are stored, over that of zeros."""
        codes, basis = factors.codes, factors.basis.to(self.dtype)

        def missed(block: _Block) -> Tensor:
            stored = codes[block.first : block.first + len(block.rows)].to(self.dtype)
            return block.rows - stored @ basis

        return self._sum(missed) / (self.of_zeros or 1.0)

    @torch.no_grad()
    def _sum(self, errors: Callable[[_Block], Tensor]) -> float:
        sums = [(block.weights * errors(block).square()).sum(dtype=torch.float64) for block in self.blocks()]
        return float(torch.stack(sums).sum())

    @torch.enable_grad()
    def accumulate(self, codes: Tensor, basis: Tensor, scale: Tensor) -> float:
        """Set the gradients of codes (V, r) and basis (r, H) to those of the error; return the error.

        Row i of the product is ``(codes[i] * scale) @ basis``.
        """
        codes.grad = basis.grad = None
        total = 0.0
        for block in self.blocks():
            ids = torch.arange(len(block.rows), device=codes.device)
            own = codes[block.first : block.first + len(block.rows)] * scale
            squared = (block.rows - gather_project(ids, own, basis)).square()
            loss = (block.weights * squared).sum() / (self.of_zeros or 1.0)
            loss.backward()
            total += float(loss.detach())
        return total


class _Found(NamedTuple):
    """Codes and basis by component, and their error."""

    error: float
    codes: Tensor
    basis: Tensor


def _searched(problem: _Problem, start: Factors, options: TFWSVDOptions) -> Factors:
    """Return the best factors that Adam and then gradient descent find from a start."""
    codes, scale, basis = _balanced(start.codes.to(problem.dtype), start.basis.to(problem.dtype))
    codes.requires_grad_()
    basis.requires_grad_()
    best = _Found(problem.accumulate(codes, basis, scale), codes.detach().clone(), basis.detach().clone())
    optimizer = torch.optim.Adam([codes, basis], lr=options.lr)
    for step in range(options.adam_steps):
        optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.adam_steps)
        optimizer.step()
        error = problem.accumulate(codes, basis, scale)
        if error < best.error:
            best = _Found(error, codes.detach().clone(), basis.detach().clone())
    best = _descended(problem, scale, best, options.sgd_steps)
    return Factors((best.codes * scale).to(start.codes.dtype), best.basis.to(start.basis.dtype))


def _descended(problem: _Problem, scale: Tensor, best: _Found, steps: int) -> _Found:
    """Return what gradient descent that accepts no higher error finds."""
    codes, basis = best.codes.clone().requires_grad_(), best.basis.clone().requires_grad_()
    problem.accumulate(codes, basis, scale)
    gradients = codes.grad, basis.grad
    slope = sum(float(each.double().square().sum()) for each in gradients if each is not None) ** 0.5
    size = sum(float(each.double().square().sum()) for each in (best.codes, best.basis)) ** 0.5
    optimizer = torch.optim.SGD([codes, basis], lr=FIRST_STEP * size / max(slope, 1e-30))
    for _ in range(steps):
        codes.grad, basis.grad = gradients
        optimizer.step()
        error = problem.accumulate(codes, basis, scale)
        if error < best.error:
            best = _Found(error, codes.detach().clone(), basis.detach().clone())
            gradients = codes.grad, basis.grad
            optimizer.param_groups[0]["lr"] *= 1.5
        else:
            codes.detach().copy_(best.codes)
            basis.detach().copy_(best.basis)
            optimizer.param_groups[0]["lr"] *= 0.5
    return best


def _balanced(codes: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (V, r) and basis (r, H) with mean squares of 1 by component, and its scale (r,) between.

    ``(codes * scale) @ basis`` is the product that was given; the columns of the codes are orthogonal, and so
    are the rows of the basis.
    """
    V, H = len(codes), basis.shape[1]
    left, upper = torch.linalg.qr(codes)
    right, lower = torch.linalg.qr(basis.t())
    rotated, values, other = torch.linalg.svd(upper @ lower.t())
    left, right = left @ rotated, other @ right.t()
    return left * V**0.5, values / (V * H) ** 0.5, (right * H**0.5).contiguous()
