"""Comparison of a table with its reconstruction, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor

from ..methods.base import BLOCK_ROWS
from ..tables.reading import AnyTable, rows_of, shape_of
from ..text.token_names import Kind, TokenName


class WorstRow(BaseModel):
    """One of the rows with the largest direction errors."""

    id: int
    token: str | None = Field(None, description="its text; null without a token or a tokenizer")
    kind: Kind | None = Field(None, description="special or unused, if the token is no text")
    direction_error: float

    def __str__(self) -> str:
        """Return the token, or the id for want of one, and the error."""
        name = str(self.id) if self.token is None else str(TokenName(self.token, self.kind))
        return f"{name} {self.direction_error:.2f}"


class TableComparison(BaseModel):
    """Errors of the reconstructed rows."""

    direction_error: float = Field(description="mean over rows of 1 - cos(row, reconstruction)")
    direction_error_p99: float = Field(description="its 99th percentile")
    weighted_direction_error: float | None = Field(
        None, description="mean weighted by how often the tokens are read; null without counts"
    )
    rmse: float = Field(description="root of the mean squared error over all entries")
    neighbor_overlap: float = Field(
        description="share of a row's nearest neighbours by cosine that stay the same, mean over sampled rows"
    )
    worst_rows: list[WorstRow]


@torch.no_grad()
def compare_tables(
    table: Tensor,
    reconstruction: Any,
    *,
    counts: Tensor | None = None,
    tokens: Callable[[list[int]], Sequence[TokenName]] | None = None,
    worst: int = 10,
    neighbors: int = 10,
    sampled_rows: int = 512,
    seed: int = 0,
) -> TableComparison:
    """Compare a table (V, H) with its reconstruction.

    ``direction_error = (1 - F.cosine_similarity(table, reconstruction)).mean()``,
    ``rmse = F.mse_loss(table, reconstruction).sqrt()``, both in float64. A row of zeros has a direction error
    of 0 if its reconstruction is zero, and of 1 otherwise.

    Args:
        table: (V, H).
        reconstruction: a compressed table, whose rows are decoded in blocks, a dense tensor (V, H), or
            another table with ``to_dense()``.
        counts: how often each token is read, (V,), for ``weighted_direction_error``.
        tokens: maps ids to names, for the worst rows, such as ``token_names`` with a tokenizer does.
        worst: how many worst rows to list.
        neighbors: how many nearest neighbours of a row to compare.
        sampled_rows: number of rows whose neighbours are compared.
        seed: of the draw of these rows.

    Raises:
        ValueError: the shapes differ, or the counts are not (V,) with a positive sum.
    """
    if not isinstance(reconstruction, get_args(AnyTable)):
        reconstruction = reconstruction.to_dense()
    if (shape := shape_of(reconstruction)) != tuple(table.shape):
        raise ValueError(f"reconstruction: expected shape {tuple(table.shape)}, got {shape}")
    if counts is not None and (counts.shape != table.shape[:1] or not float(counts.sum()) > 0):
        raise ValueError(
            f"counts: expected shape ({len(table)},) and a positive sum, "
            f"got {tuple(counts.shape)} and {float(counts.sum()):g}"
        )
    errors, squared = [], 0.0
    for ids in torch.arange(len(table), device=table.device).split(BLOCK_ROWS):
        x, y = table[ids].double(), rows_of(reconstruction, ids).to(table.device).double()
        both_zero = (x == 0).all(1) & (y == 0).all(1)
        errors.append(torch.where(both_zero, 0.0, 1 - F.cosine_similarity(x, y, eps=1e-30)))
        squared += float((x - y).square().sum())
    error = torch.cat(errors)
    weights = None if counts is None else counts.to(error) / counts.sum().to(error)
    worst_ids = error.argsort(descending=True)[:worst].tolist()
    names = tokens(worst_ids) if tokens else [TokenName(None)] * len(worst_ids)
    return TableComparison(
        direction_error=float(error.mean()),
        direction_error_p99=float(error.kthvalue(max(1, round(0.99 * len(error)))).values),
        weighted_direction_error=None if weights is None else float(weights @ error),
        rmse=(squared / table.numel()) ** 0.5,
        neighbor_overlap=_neighbor_overlap(table, reconstruction, neighbors, sampled_rows, seed),
        worst_rows=[
            WorstRow(id=i, token=name.text, kind=name.kind, direction_error=float(error[i]))
            for i, name in zip(worst_ids, names, strict=True)
        ],
    )


def _neighbor_overlap(
    table: Tensor, rebuilt: AnyTable, neighbors: int, sampled_rows: int, seed: int
) -> float:
    """Return the mean share of nearest neighbours that both tables have in common."""
    neighbors = min(neighbors, len(table) - 1)
    if neighbors < 1:
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(len(table), generator=generator)[:sampled_rows].to(table.device)
    before, after = (_nearest(each, queries, neighbors) for each in (table, rebuilt))
    return float((before.unsqueeze(2) == after.unsqueeze(1)).any(2).double().mean())


def _nearest(table: AnyTable, queries: Tensor, count: int) -> Tensor:
    """Return the ids (Q, count) of the nearest rows by cosine, without the row itself."""
    device = queries.device

    def normal(ids: Tensor) -> Tensor:
        return F.normalize(rows_of(table, ids).to(device).float(), dim=1)

    wanted = normal(queries)
    best = torch.full((len(queries), count), -3.0, device=device)
    found = torch.zeros(len(queries), count, dtype=torch.int64, device=device)
    for ids in torch.arange(shape_of(table)[0], device=device).split(BLOCK_ROWS):
        similarity = wanted @ normal(ids).t()
        similarity[queries.unsqueeze(1) == ids] = -2.0
        best, places = torch.cat([best, similarity], 1).topk(count, dim=1)
        found = torch.cat([found, ids.expand(len(queries), -1)], 1).gather(1, places)
    return found
