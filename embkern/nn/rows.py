"""``TableEmbedding`` and ``TableHead``, over a ``RowTable`` of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tables.rows import RowTable
from .adjustment import inverse
from .base import CompressedEmbedding, CompressedHead
from .table_module import TableModule

_SAMPLED_ROWS = 64  # from which the units of an adjustment are estimated


class RowTableModule(TableModule):
    """Holds a ``RowTable``: its integers as buffers, its floating-point tensors as parameters."""

    keeps_stored_dtype = True
    row_table: type[RowTable]
    _settings: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self._settings["num_embeddings"], self._settings["embedding_dim"]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the decoded rows."""
        first: Tensor = getattr(self, self.tensor_names[0])
        return first.dtype

    @property
    def table(self) -> RowTable:
        """The table, which shares memory with the module; it is not validated."""
        return self._table_of(self.tensors())

    def _table_of(self, tensors: dict[str, Any]) -> RowTable:
        return self.row_table(**tensors, **self._settings, check=False)

    def _live(self) -> RowTable:
        """Return the table as lookups use it: with its adjustment, or detached if frozen."""
        return self._table_of(
            {
                name: self._trained(name) if name in self._parameters else getattr(self, name)
                for name in self.tensor_names
            }
        )

    def _follow(self, row_table: type[RowTable], settings: dict[str, Any]) -> None:
        """Take the kind of a table, and its settings, which modules over one table share."""
        self.row_table, self.tensor_names, self._settings = row_table, row_table.tensor_names(), settings

    def share(self, other: TableModule) -> None:
        """Replace this module's tensors and settings by those of another one."""
        assert isinstance(other, RowTableModule)
        self._follow(other.row_table, other._settings)
        super().share(other)

    def replace(self, table: Any) -> None:
        """Replace the tensors by those of a table of this kind, and the settings for all modules over it."""
        super().replace(table)
        self._settings.update(table.settings())

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        rows = self._live().decode(ids)
        rows = (rows if scale == 1.0 else rows * scale).to(self.dtype)
        if padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    @torch.enable_grad()
    def _units(self) -> dict[str, Tensor]:
        """Return what a change of 1 means, from the derivatives of some rows.

        For a tensor with a part per row, a change of 1 in a direction moves the row by a length of at most 1
        on average; for one that rows share, a change of all entries by 1 moves an entry by at most 1.
        """
        table = self._table_of({name: tensor.detach() for name, tensor in self.tensors().items()})
        table = table.to(torch.promote_types(self.dtype, torch.float32))
        ids = torch.linspace(0, table.num_embeddings - 1, _SAMPLED_ROWS, device=table.device).long().unique()
        leaves = {n: t.requires_grad_() for n, t in table.tensors().items() if t.is_floating_point()}
        rows = table.decode(ids)
        signs = torch.randint(2, rows.shape, generator=torch.Generator().manual_seed(0)).to(rows) * 2 - 1
        owned = [name for name in leaves if name in table.per_row]
        common = [name for name in leaves if name not in table.per_row]
        sizes = dict.fromkeys(leaves, torch.zeros((), device=table.device, dtype=rows.dtype))
        if owned:
            grads = torch.autograd.grad((rows * signs).sum(), [leaves[n] for n in owned], retain_graph=True)
            parts = table.parts_of(ids)
            for name, grad in zip(owned, grads, strict=True):
                sizes[name] = grad[parts].reshape(len(ids), -1).square().sum(1).sqrt().mean()
        entries = [row[number * 7 % len(row)] for number, row in enumerate(rows.unbind())] if common else []
        shared = [leaves[name] for name in common]
        found = [
            [grad.abs().sum() for grad in torch.autograd.grad(entry, shared, retain_graph=True)]
            for entry in entries
        ]
        for name, of_entries in zip(common, zip(*found, strict=True), strict=True):
            felt = torch.stack(of_entries)
            sizes[name] = felt.sum() / (felt > 0).sum().clamp_min(1)  # no tensor has part in a row of zeros
        return {name: inverse(size) for name, size in sizes.items()}


class TableEmbedding(RowTableModule, CompressedEmbedding):
    """Drop-in for ``nn.Embedding`` over a ``RowTable``: a table in any representation.

    ``forward(ids) = table.decode(ids) * scale``, (``*``) to (``*``, H)

    The floating-point tensors of the table (scales, codebooks, cores, layers, kept rows) are trainable as
    they are; its codes are fixed. In a model the embedding is frozen until ``embkern.unfreeze_table``, which
    makes changes of them trainable. Rows are decoded by plain torch.

    Args:
        table: the table, whose memory the embedding shares.
        padding_idx: positions with this id contribute no gradient. Its row is decoded like every other.
        scale: constant factor of the output, rounded to its dtype. ``weight`` is the unscaled table.

    Raises:
        ValueError: ``padding_idx`` is out of range.
    """

    def __init__(self, table: RowTable, *, padding_idx: int | None = None, scale: float = 1.0) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, padding_idx, scale, None)
        self._follow(type(table), table.settings())
        self._register(table)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64), times ``scale``: (``*``, H)."""
        rows = super().forward(ids)
        self._table_of(self._stored()).check_known(ids)
        return rows

    @classmethod
    def from_table(cls, table: RowTable, **kwargs: Any) -> TableEmbedding:
        """Return ``cls(table, **kwargs)``."""
        return cls(table, **kwargs)

    def head(self, bias: nn.Parameter | None = None) -> TableHead:
        """Return the tied output head over the same table."""
        return TableHead(self, bias)

    def _described(self) -> list[str]:
        names = self.row_table.setting_names
        return [f"kind={self.row_table.kind!r}", *(f"{name}={self._settings[name]!r}" for name in names)]


class TableHead(RowTableModule, CompressedHead):
    """The tied output head over the table of a ``TableEmbedding``.

    ``forward(h) = F.linear(h, weight, bias)``, (``*``, H) to (``*``, V)

    Forward and backward decode ``weight`` in blocks of rows and never hold all of it.

    Args:
        embedding: the embedding whose tensors the head shares. Its ``scale`` is not applied, as tied heads
            use the unscaled table.
        bias: (V,) or None.
    """

    def __init__(self, embedding: TableEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._live().logits(hidden)

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the cross-entropy of the logits, which are never held: see ``RowTable.cross_entropy``."""
        return self._live().cross_entropy(hidden, labels, bias=self.bias, **options)
