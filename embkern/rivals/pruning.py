"""Vocabulary pruning for comparison: the most frequent rows are kept, and all others share one row."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..methods.base import Options, byte_budget, check_table, parse_options, ratio_error, row_weights
from .reconstruction import Reconstruction, Storage, half, packed_bytes, storage_dtype


class VocabularyPruningOptions(Options):
    """Options of ``vocabulary_pruning``."""

    storage: Storage = Field("table", description="dtype of the rows: the table's, or float16")


@torch.no_grad()
def vocabulary_pruning(
    table: Tensor, *, ratio: float, counts: Tensor | None = None, **options: Any
) -> Reconstruction:
    """Keep the rows of the most frequent tokens unchanged, and replace all others by their mean.

    ``kept = counts.argsort(descending=True, stable=True)[:K]``. The mean of the others is weighted by their
    counts. A bitmap marks the kept rows; the prefix sums that look-ups need are computed when it is loaded
    and not counted. Where all rows fit, neither bitmap nor mean is stored, and with ``storage="table"`` the
    result is exact.

    Args:
        table: (V, H).
        ratio: bytes of the table as stored over bytes of rows, mean and bitmap.
        counts: (V,), how often each token is read. None keeps the first ids, as most vocabularies are ordered
            by frequency.
        options: the fields of ``VocabularyPruningOptions``.

    Raises:
        ValueError, TypeError: the ratio cannot be reached (the message names the highest that can), or an
            argument is not usable.

    Source: A. Abdaoui et al., Load what you need: smaller versions of multilingual BERT (2020).
    """
    chosen = parse_options(VocabularyPruningOptions, options, "vocabulary_pruning")
    check_table(table)
    budget = byte_budget(table, ratio)
    V, H = table.shape
    weights = row_weights(counts, V).to(table.device)
    dtype = storage_dtype(table, chosen.storage)
    rows = half(table.float()) if chosen.storage == "float16" else table.float()
    row, bitmap = H * dtype.itemsize, packed_bytes(V, 1)
    if V * row <= budget:
        return Reconstruction(rows.clone(), {"rows": V * row}, {"kept": V})
    if row + bitmap > budget:
        raise ratio_error(table, ratio, min(row + bitmap, V * row))
    kept = (budget - row - bitmap) // row
    order = weights.argsort(descending=True, stable=True)
    others = order[kept:]
    share = weights[others] if weights[others].any() else torch.ones_like(weights[others])
    mean = (share / share.sum()) @ table[others].double()
    rows = rows.index_copy(0, others, mean.to(dtype).float().repeat(len(others), 1))
    return Reconstruction(rows, {"rows": kept * row, "mean": row, "bitmap": bitmap}, {"kept": kept})
