"""Vocabulary pruning: rows that are read are kept as they are, and all others removed."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..tables.kept_rows import Unknown
from ..tables.pruned import PrunedTable
from .base import (
    Options,
    byte_budget,
    check_table,
    parse_options,
    ratio_error,
    row_weights,
)
from .left_out_rows import ID_BYTES, nearest_rows, weighted_mean
from .storage import Storage, rounded, storage_dtype


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
