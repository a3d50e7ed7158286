"""``PackedEmbedding`` and ``PackedHead``, over a ``PackedTable``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import first_edition
from ..ops.backends import Backend
from ..ops.gather_decode import Tensors, decode_rows
from ..ops.packed_cross_entropy import packed_cross_entropy
from ..ops.packed_format import CODE_DTYPES, PackedTensors
from ..ops.packed_logits import packed_logits
from ..tables import packed
from ..tables.packed import PackedTable
from .adjustment import inverse
from .base import CompressedEmbedding, CompressedHead
from .table_module import ADJUSTMENT, TableModule

_BLOCK_ROWS = 8192  # rows that are decoded at a time


class PackedTableModule(TableModule):
    """Holds a ``PackedTable``: records, directory, tiers and levels as buffers, the others as parameters.

    The buffers are integers, which no cast of a model changes, of dtypes that gloo and NCCL send: levels of
    the first edition are int16 in a table and int32 here.
    """

    kind = "packed"
    table_type = PackedTable
    tensor_names = packed.TENSORS
    code_names = tuple(CODE_DTYPES)
    keeps_stored_dtype = True
    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    scales: nn.Parameter
    basis: nn.Parameter | None
    offset: nn.Parameter | None
    _width: int

    @classmethod
    def code_dtype(cls, name: str, shape: tuple[int, ...]) -> torch.dtype | None:
        """Return the dtype of an integer tensor of a table and of files; None for the others."""
        if name == "levels" and tuple(shape) == first_edition.LEVELS_SHAPE:
            return first_edition.LEVELS_DTYPES[0]
        return CODE_DTYPES[name][0] if name in CODE_DTYPES else None

    @classmethod
    def held_dtype(cls, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the module holds a tensor that a table has in this one."""
        in_file, held = first_edition.LEVELS_DTYPES
        return held if name == "levels" and dtype == in_file else dtype

    @staticmethod
    def settings(table: PackedTable) -> dict[str, Any]:
        """Return the fields of a packed table that are not tensors."""
        return {"embedding_dim": table.embedding_dim}

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self.scales.shape[0], self._width

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the decoded rows."""
        return self.scales.dtype

    @property
    def table(self) -> PackedTable:
        """The packed table, not validated; it shares memory, except levels of the first edition."""
        tensors: dict[str, Any] = self.tensors()
        levels = tensors["levels"]
        tensors["levels"] = levels.to(self.code_dtype("levels", levels.shape))
        return PackedTable(**tensors, embedding_dim=self._width, check=False)

    def _packed_tensors(self) -> Tensors:
        # Seven calls of nn.Module.__getattr__ take as long as the lookup of a row.
        codes, floats = self._buffers, self._parameters
        try:
            held: Any = (
                codes["records"],
                codes["directory"],
                codes["tiers"],
                codes["levels"],
                floats["scales"],
                floats["basis"],
                floats["offset"],
            )
        except KeyError:  # A parametrization or FSDP has put an attribute in a parameter's place.
            held = tuple(getattr(self, name) for name in PackedTensors._fields)
        tensors: Tensors = held
        if self.frozen:
            basis, offset = tensors[5], tensors[6]
            if (
                ADJUSTMENT in self._modules
                or tensors[4].requires_grad
                or (basis is not None and basis.requires_grad)
                or (offset is not None and offset.requires_grad)
            ):
                scales, basis, offset = (self._trained(name) for name in PackedTensors._fields[4:])
                tensors = (*tensors[:4], scales, basis, offset)
        return tensors

    def _units(self) -> dict[str, Tensor]:
        """Return what a change of 1 means: in length of a row, and in entries of rows.

        The unit of the basis makes a change of all its entries by 1 change an entry of a row by at most 1, on
        average over the rows that have coefficients.
        """
        table = self.table.to(torch.promote_types(self.dtype, torch.float32))
        every = torch.arange(table.num_embeddings, device=table.scales.device).split(_BLOCK_ROWS)
        unscaled = dataclasses.replace(table, scales=torch.ones_like(table.scales), offset=None, check=False)
        norms = torch.cat([torch.linalg.vector_norm(unscaled.decode(ids), dim=1) for ids in every])
        units = {"scales": inverse(norms), "offset": torch.ones(())}
        if table.basis is not None:
            in_basis = table.tiers[table.tier_of_rows(), 0].bool()
            sizes = torch.cat([table.coefficients(ids).abs().sum(1) for ids in every])[in_basis]
            units["basis"] = inverse(sizes.mean() if len(sizes) else torch.ones(()))
        return units

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        rows = decode_rows(ids, self._packed_tensors(), self._width, scale, padding_idx, self.backend)
        return rows.to(self.dtype)


class PackedEmbedding(PackedTableModule, CompressedEmbedding):
    """Drop-in for ``nn.Embedding`` over a ``PackedTable``.

    ``forward(ids) = gather_decode(ids, records, ..., scales, basis, offset) * scale``, (``*``) to (``*``, H)

    Scales, basis and offset are trainable as they are; the codes are fixed. In a model the embedding is
    frozen until ``embkern.unfreeze_table``, which makes changes of them trainable.

    Args:
        table: the table, whose memory the embedding shares.
        padding_idx: positions with this id contribute no gradient. Its row is decoded like every other.
        scale: constant factor of the output, rounded to its dtype. ``weight`` is the unscaled table.
        backend: passed to ``gather_decode``; None chooses by device and dtype.

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

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64), times ``scale``: (``*``, H)."""
        packed = self._packed_tensors()  # once, for the dtype, too
        if ADJUSTMENT in self._modules:  # whose dtype can be wider
            return super().forward(ids)
        scale = self._rounded_scale.get(packed[4].dtype, self._scale)
        return decode_rows(ids, packed, self._width, scale, self.padding_idx, self.backend)

    @classmethod
    def from_table(cls, table: PackedTable, **kwargs: Any) -> PackedEmbedding:
        """Return ``cls(table, **kwargs)``."""
        return cls(table, **kwargs)

    def head(self, bias: nn.Parameter | None = None) -> PackedHead:
        """Return the tied output head over the same packed table."""
        return PackedHead(self, bias)

    def _described(self) -> list[str]:
        return [f"tiers={len(self.tiers)}"]


class PackedHead(PackedTableModule, CompressedHead):
    """The tied output head over the packed table of an embedding.

    ``forward(h) = F.linear(h, weight, bias)``, (``*``, H) to (``*``, V)

    Forward and backward decode ``weight`` in blocks of rows and never hold all of it.

    Args:
        embedding: the embedding whose tensors the head shares. Its ``scale`` is not applied, as tied heads
            use the unscaled table.
        bias: (V,) or None.
    """

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        self._width = embedding.embedding_dim

    def _logits(self, hidden: Tensor) -> Tensor:
        return packed_logits(hidden, *self._packed_tensors(), backend=self.backend)

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the cross-entropy of the logits, which are never held: see ``packed_cross_entropy``."""
        tensors = self._packed_tensors()
        return packed_cross_entropy(hidden, labels, *tensors, bias=self.bias, backend=self.backend, **options)
