"""Vocabulary pruning for comparison: the rows of a corpus's tokens, and one row for all others."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..methods.base import Options, byte_budget, parse_options, refuse_ratio, row_weights
from .reconstruction import Reconstruction, Storage, half, packed_bytes, storage_dtype


class VocabularyPruningOptions(Options):
    """Options of ``vocabulary_pruning``."""

    storage: Storage = Field("table", description="dtype of the rows: the table's, or float16")


@torch.no_grad()
def vocabulary_pruning(
    table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any
) -> Reconstruction:
    """Keep the rows of the most counted tokens as they are, and give all others their mean.

    ``kept = counts.argsort(descending=True)[:K]``, ties in the order of ids. The mean weighs rows by their
    counts. A bitmap says which rows are kept; the sums over it that find a row are rebuilt when it is read.
    Where all rows fit, there is neither bitmap nor mean, and with ``storage="table"`` the result is exact.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of rows, mean and bitmap.
        counts: (V,), how often each token is read; None: all alike, so that the first ids are kept, which
            most vocabularies order by frequency.
        options: the fields of ``VocabularyPruningOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be met (the message names the highest that can), or an
            argument is not usable.

    Source: A. Abdaoui et al., Load what you need: smaller versions of multilingual BERT (2020).
    """
    chosen = parse_options(VocabularyPruningOptions, options, "vocabulary_pruning")
    budget = byte_budget(table, ratio)
    V, H = table.shape
    weights = row_weights(counts, V).to(table.device)
    dtype = storage_dtype(table, chosen.storage)
    rows = half(table.float()) if chosen.storage == "float16" else table.float()
    row, bitmap = H * dtype.itemsize, packed_bytes(V, 1)
    if V * row <= budget:
        return Reconstruction(rows.clone(), {"rows": V * row}, {"kept": V})
    if row + bitmap > budget:
        raise refuse_ratio(table, ratio, min(row + bitmap, V * row))
    kept = (budget - row - bitmap) // row
    order = weights.argsort(descending=True, stable=True)
    others = order[kept:]
    share = weights[others] if weights[others].any() else torch.ones_like(weights[others])
    mean = (share / share.sum()) @ table[others].double()
    rows = rows.index_copy(0, others, mean.to(dtype).float().repeat(len(others), 1))
    return Reconstruction(rows, {"rows": kept * row, "mean": row, "bitmap": bitmap}, {"kept": kept})
