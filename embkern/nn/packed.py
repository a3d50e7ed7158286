"""The embedding and the tied head over a ``PackedTable``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.backends import Backend
from ..ops.gather_decode import gather_decode
from ..ops.packed_logits import packed_logits
from ..tables import packed
from ..tables.packed import PackedTable
from .base import CompressedEmbedding, CompressedHead, TableModule


class PackedTableModule(TableModule):
    """Parameters scales and perhaps basis and offset; buffers records, directory, tiers and levels.

    The buffers are whole numbers: no cast of a model touches them.
    """

    kind = "packed"
    table_type = PackedTable
    tensor_names = packed.TENSORS
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {
        "records": torch.int32,
        "directory": torch.int32,
        "tiers": torch.uint8,
        "levels": torch.int16,
    }
    keeps_stored_dtype = True
    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    scales: nn.Parameter
    basis: nn.Parameter | None
    offset: nn.Parameter | None
    _width: int

    @staticmethod
    def settings(table: PackedTable) -> dict[str, Any]:
        """Return what a packed table is made of besides its tensors."""
        return {"embedding_dim": table.embedding_dim}

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self.scales.shape[0], self._width

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the parameters and of the decoded rows."""
        return self.scales.dtype

    @property
    def table(self) -> PackedTable:
        """The packed table, sharing memory with the module; ValueError if its tensors are damaged."""
        tensors: dict[str, Any] = self.tensors()
        return PackedTable(**tensors, embedding_dim=self._width)

    def _in_order(self) -> tuple[Any, ...]:
        codes = (self.records, self.directory, self.tiers, self.levels)
        return *codes, self.scales, self.basis, self.offset

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        return gather_decode(
            ids,
            *self._in_order(),
            embedding_dim=self._width,
            scale=scale,
            padding_idx=padding_idx,
            backend=self.backend,
        )


class PackedEmbedding(PackedTableModule, CompressedEmbedding):
    """Drop-in for ``nn.Embedding`` over a ``PackedTable``.

    ``forward(ids) = gather_decode(ids, records, ..., scales, basis, offset) * scale``

    Scales, basis and offset train; the codes are frozen.

    Args:
        table: whose memory the layer shares.
        padding_idx: positions with this id contribute no gradient. Its row is decoded like every other.
        scale: constant factor on the output, rounded to its dtype. ``weight`` is the unscaled table.
        backend: passed to ``gather_decode``; None takes the best for the device.

    Raises:
        ValueError: ``padding_idx`` is out of range.
    """

    def __init__(
        self,
        table: PackedTable,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, padding_idx, scale, backend)
        self._width = table.embedding_dim
        self._register(table)

    @classmethod
    def from_table(cls, table: PackedTable, **kwargs: Any) -> PackedEmbedding:
        """Return a layer over a packed table, sharing its memory."""
        return cls(table, **kwargs)

    def head(self, bias: nn.Parameter | None = None) -> PackedHead:
        """Return the tied output head over the same packed table."""
        return PackedHead(self, bias)

    def _described(self) -> list[str]:
        return [f"tiers={len(self.tiers)}"]


class PackedHead(PackedTableModule, CompressedHead):
    """The tied output head over the same packed table, decoded some hundred rows at a time.

    ``forward(h) = F.linear(h, weight, bias)`` where ``weight`` is the decoded table, of which forward and
    backward never hold more than a piece.

    Args:
        embedding: the embedding whose tensors the head shares. Its ``scale`` is not applied, as tied heads
            use the unscaled table.
        bias: the dense head's bias (V,), if it has one.
    """

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        self._width = embedding.embedding_dim

    def _logits(self, hidden: Tensor) -> Tensor:
        return packed_logits(hidden, *self._in_order(), backend=self.backend)
