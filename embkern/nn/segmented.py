"""``SegmentedEmbedding``: a packed embedding whose rows consist of segments that are stored as rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tables.packed import PackedTable
from .packed import PackedEmbedding


class SegmentedEmbedding(PackedEmbedding):
    """Drop-in for ``nn.Embedding`` whose row i is the concatenation of rows ``i * n`` to ``i * n + n - 1``.

    ``forward(ids) = F.embedding(ids.unsqueeze(-1) * n + torch.arange(n), rows).flatten(-2) * scale``, (``*``)
    to (``*``, H)

    A per-layer table has a segment for every layer in each row, and their lengths differ from layer to layer.
    As rows of the packed table, the segments have scales and rates of their own.

    Args:
        table: (V n, H / n).
        segments: n, the number of segments in a row.
        kwargs: ``padding_idx``, ``scale`` and ``backend``, as ``PackedEmbedding`` takes them.

    Raises:
        ValueError: n does not divide the number of rows of the table, or ``padding_idx`` is out of range.
    """

    def __init__(self, table: PackedTable, *, segments: int, **kwargs: Any) -> None:
        if segments < 1 or table.num_embeddings % segments:
            raise ValueError(
                f"segments: expected a divisor of the table's {table.num_embeddings} rows, got {segments}"
            )
        super().__init__(table, **kwargs)
        self.segments = segments
        self.num_embeddings = table.num_embeddings // segments
        self.embedding_dim = table.embedding_dim * segments

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the decoded table."""
        return self.num_embeddings, self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64), times ``scale``: (``*``, H)."""
        return self._rows(ids, self._rounded_scale.get(self.dtype, self.scale), self.padding_idx)

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        own = ids.long().unsqueeze(-1) * self.segments + torch.arange(self.segments, device=ids.device)
        rows = super()._rows(own, scale).flatten(-2)
        if padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    def _described(self) -> list[str]:
        return [*super()._described(), f"segments={self.segments}"]
