"""Vocabulary pruning: rows that are read are kept as they are, and all others removed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..tables.kept_rows import Unknown
from ..tables.pruned import PrunedTable
from .base import (
    Options,
    Rows,
    block_rows,
    blocks,
    byte_budget,
    check_table,
    parse_options,
    ratio_error,
    row_weights,
    take_rows,
)
from .storage import Storage, rounded, storage_dtype

ID_BYTES = 4  # of an id that is kept, and of the number of a nearest row


class PruneOptions(Options):
    """Options of ``prune``."""

    unknown: Unknown = Field(
        "mean",
        description="what a token that was not kept gets: mean, the mean of the removed rows; nearest, the "
        "kept row of the most similar direction; error, a lookup is refused",
    )
    storage: Storage = Field("table", description="dtype of the rows: the table's, or float16")


@torch.no_grad()
def prune(
    table: Tensor,
    *,
    ratio: float | None = None,
    counts: Tensor | None = None,
    read: Tensor | None = None,
    **options: Any,
) -> PrunedTable:
    """Keep some rows of a table unchanged, and remove all others.

    Without a ratio these are the rows that are read, so that nothing changes for a text with these tokens:
    ``kept = read.nonzero()``. With one they are the rows of the most frequent tokens that fit:
    ``kept = counts.argsort(descending=True, stable=True)[:K]``. Of each kept row its id is stored, an int32;
    the mean of the others is weighted by their counts.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of rows, ids and what stands for the others; None
            keeps the rows that are read.
        counts: (V,), how often each token is read. None keeps the first ids, as most vocabularies are ordered
            by frequency.
        read: (V,) bool, which tokens are read; needed without a ratio.
        options: the fields of ``PruneOptions``.

    Raises:
        ValueError, TypeError: there is neither a ratio nor ``read``, the ratio cannot be reached (the message
            names the highest that can), or an argument is not usable.

    Source: A. Abdaoui et al., Load what you need: smaller versions of multilingual BERT (2020);
        M. Williams, N. Aletras, arXiv 2309.08708, which keeps the rows that a data set reads.
    """
    chosen = parse_options(PruneOptions, options, "prune")
    check_table(table)
    V = table.shape[0]
    weights = row_weights(counts, V).to(table.device)
    dtype = storage_dtype(table, chosen.storage)
    if ratio is None:
        kept = _read_ids(read, V).to(table.device)
    else:
        size = _most_that_fit(table, ratio, dtype, chosen.unknown)
        kept = weights.argsort(descending=True, stable=True)[:size].sort().values
    removed = torch.ones(V, dtype=torch.bool, device=table.device)
    removed[kept] = False
    others = removed.nonzero().flatten()
    rows, nearest = rounded(table[kept], dtype), None
    if chosen.unknown == "mean":
        mean = weighted_mean(table, others, weights[others])
        rows = torch.cat([rows, rounded(mean, dtype).unsqueeze(0)])
    if chosen.unknown == "nearest":
        nearest = nearest_rows(table, kept, others)
    return PrunedTable(
        rows,
        kept.int(),
        nearest,
        chosen.unknown,
        num_embeddings=V,
        embedding_dim=table.shape[1],
        facts={"kept": len(kept), "unknown": chosen.unknown},
        check=False,
    )


def _read_ids(read: Tensor | None, num_embeddings: int) -> Tensor:
    """Return the ids that are read, or raise ValueError."""
    if read is None:
        raise ValueError(
            "prune: expected counts of text whose tokens are kept (count_text, counts), or a ratio, "
            "got neither"
        )
    if read.shape != (num_embeddings,) or read.dtype != torch.bool:
        raise ValueError(
            f"read: expected shape ({num_embeddings},) of bool, got {tuple(read.shape)} of {read.dtype}"
        )
    if not read.any():
        raise ValueError("read: expected a token that is read, got none")
    return read.nonzero().flatten()


def _most_that_fit(table: Tensor, ratio: float, dtype: torch.dtype, unknown: Unknown) -> int:
    """Return the largest number of rows, at least 1, that fit a ratio."""
    V, H = table.shape
    budget, row = byte_budget(table, ratio), H * dtype.itemsize

    def nbytes(kept: int) -> int:
        others = {"mean": row, "nearest": ID_BYTES * max(1, V - kept), "error": 0}
        return kept * (row + ID_BYTES) + others[unknown]

    if nbytes(1) > budget:
        raise ratio_error(table, ratio, nbytes(1))
    if nbytes(V) <= budget:
        return V
    return min(V - 1, 1 + (budget - nbytes(1)) // (row + ID_BYTES * (unknown != "nearest")))


def weighted_mean(table: Rows, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of rows ids (n,) with weights (n,) float64, (H,) float64; equal ones if all are 0."""
    share = weights if weights.any() else torch.ones_like(weights)
    share = share / share.sum()
    total = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    size = block_rows(table)
    for some, weight in zip(ids.split(size), share.split(size), strict=True):
        total += weight @ take_rows(table, some).double()
    return total


def nearest_rows(table: Rows, kept: Tensor, others: Tensor) -> Tensor:
    """Return for each of the other rows the number of the kept row of the largest cosine, int32."""
    known = F.normalize(take_rows(table, kept), eps=1e-30)
    found = []
    for some in others.split(256) if len(others) else ():
        best = torch.full((len(some),), -2.0, dtype=known.dtype, device=table.device)
        place = torch.zeros(len(some), dtype=torch.int64, device=table.device)
        rows, first = F.normalize(take_rows(table, some), eps=1e-30), 0
        for part in blocks(known):
            value, near = (rows @ part.t()).max(1)
            better = value > best
            best, place = torch.where(better, value, best), torch.where(better, near + first, place)
            first += len(part)
        found.append(place.int())
    return torch.cat(found) if found else kept.new_zeros(1, dtype=torch.int32)
