"""``UnseenRows``: the rows that a compressed table does not store, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..io.tensor_format import TensorFormat
from .kept_rows import KeptRowsTable

FORMAT = TensorFormat(
    "embkern.unseen_rows/1",
    "rows that a compressed table does not store",
    required=("ids", "rows"),
    settings=("num_embeddings", "source"),
)


@dataclass(frozen=True, eq=False)
class UnseenRows:
    """The dense rows of the ids that a ``PrunedTable`` or ``PrunedPackedTable`` does not keep.

    Attributes:
        ids: (n,) int32, ascending.
        rows: (n, H), floating-point, as in the dense table.
        num_embeddings: V of the dense table.
        source: checksum of the dense table, by which a compressed one names it.

    Raises:
        ValueError: shapes do not fit each other, or ids are not ascending and below V.
        TypeError: a dtype is wrong.
    """

    ids: Tensor
    rows: Tensor
    num_embeddings: int
    source: str

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int32:
            raise TypeError(f"ids: expected torch.int32, got {self.ids.dtype}")
        if not self.rows.is_floating_point():
            raise TypeError(f"rows: expected a floating-point dtype, got {self.rows.dtype}")
        if self.ids.dim() != 1 or not len(self.ids):
            raise ValueError(f"ids: expected shape (n,) with n >= 1, got {tuple(self.ids.shape)}")
        if self.rows.dim() != 2 or len(self.rows) != len(self.ids) or not self.rows.shape[1]:
            raise ValueError(
                f"rows: expected shape ({len(self.ids)}, H) with H >= 1, got {tuple(self.rows.shape)}"
            )
        if type(self.num_embeddings) is not int or type(self.source) is not str:
            raise TypeError(
                "num_embeddings, source: expected an integer and a string, got "
                f"{self.num_embeddings!r} and {self.source!r}"
            )
        ascending = bool((self.ids[1:] > self.ids[:-1]).all())
        if not ascending or int(self.ids[0]) < 0 or int(self.ids[-1]) >= self.num_embeddings:
            raise ValueError(f"ids: expected ascending ids below {self.num_embeddings}, got others")

    @classmethod
    def of(cls, table: Tensor, compressed: KeptRowsTable, source: str) -> UnseenRows:
        """Return the rows of a dense table (V, H) that a compressed one does not keep.

        Raises:
            ValueError: it keeps all of them.
        """
        ids = compressed.others().to(table.device)
        return cls(ids.int().cpu(), table.detach()[ids].cpu(), len(table), source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to one safetensors file; an existing file is replaced atomically."""
        tensors = {"ids": self.ids, "rows": self.rows}
        FORMAT.save(path, tensors, num_embeddings=self.num_embeddings, source=self.source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnseenRows:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of such rows.
        """
        return FORMAT.load(path, lambda tensors, settings: cls(**tensors, **settings))
