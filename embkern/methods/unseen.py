"""The rows of a table that are read, for methods that do not store the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..tables.packed import PackedTable
from ..tables.pruned import PrunedPackedTable
from .base import Rows, row_weights, take_rows
from .calibration import Calibration
from .left_out_rows import ID_BYTES, nearest_rows, weighted_mean
from .storage import rounded


def is_read(
    num_embeddings: int, read: Tensor | None, counts: Tensor | None, calibration: Calibration | None
) -> Tensor:
    """Return which rows (V,) bool are read: as given, or with a count, here or in a calibration on text.

    Raises:
        ValueError: none of them is given, or no row is read.
    """
    counted = None if counts is None else row_weights(counts, num_embeddings) > 0
    if read is not None:
        if read.shape != (num_embeddings,) or read.dtype != torch.bool:
            raise ValueError(
                f"read: expected shape ({num_embeddings},) of bool, got {tuple(read.shape)} of {read.dtype}"
            )
        found = read.cpu()
    elif counted is not None:
        found = counted
    elif calibration is not None and calibration.on_text:
        found = calibration.inputs > 0
    else:
        raise ValueError(
            "unseen: expected counts of text (count_text, counts) or a calibration on text, from which rows "
            "follow that are not read, got neither"
        )
    if not found.any():
        raise ValueError("read: expected a row that is read, got none")
    return found


class ReadRows:
    """The rows of a table that are read.

    Attributes:
        kept: (K,) int64, their ids.
        table: (K, H), a copy of them in the dtype of the table.
        nbytes: bytes of everything that maps ids to them and stands for the others.
    """

    def __init__(self, table: Rows, read: Tensor, unseen: Literal["mean", "nearest"]) -> None:
        self.kept, self._others = torch.nonzero(read).flatten(), torch.nonzero(~read).flatten()
        self._whole, self._unseen = table, unseen
        self.table = take_rows(table, self.kept).to("cpu", table.dtype)
        each = 4 * table.shape[1] if unseen == "mean" else ID_BYTES * len(self._others)
        self.nbytes = ID_BYTES * len(self.kept) + each

    def pruned(self, packed: PackedTable, counts: Tensor | None) -> PrunedPackedTable:
        """Return the table of these rows as packed; the mean of the others is weighted by counts (V,)."""
        mean = nearest = None
        others = self._others.to(self._whole.device)
        if self._unseen == "mean":
            weights = row_weights(counts, len(self._whole))[self._others].to(others.device)
            mean = rounded(weighted_mean(self._whole, others, weights).cpu(), packed.dtype)
        else:
            nearest = nearest_rows(self._whole, self.kept.to(others.device), others).cpu()
        return PrunedPackedTable(
            **packed.tensors(),
            kept_ids=self.kept.int(),
            mean_row=mean,
            nearest_kept=nearest,
            unknown=self._unseen,
            num_embeddings=len(self._whole),
            embedding_dim=packed.embedding_dim,
            facts={"kept": len(self.kept), "unseen": len(self._others), "unknown": self._unseen},
            check=False,
        )
