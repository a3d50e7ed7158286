"""``PackedEmbeddingBag``: sums or means of rows of a ``PackedTable``."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.tensor_format import checksum, verify_checksums
from ..ops.backends import Backend
from ..tables.packed import TENSORS, PackedTable
from .packed import PackedTableModule
from .table_module import ADJUSTMENT


class PackedEmbeddingBag(PackedTableModule):
    """Drop-in for ``nn.EmbeddingBag`` over a ``PackedTable``.

    ``forward(ids, offsets) = F.embedding_bag(ids, weight, offsets, mode=mode)``, (N,) and (B,) to (B, H)

    Each distinct row is decoded once. Sums run in the dtype of the module; ``state_dict`` has the
    floating-point tensors, with the changes of an adjustment, in the dtype of ``table``, 16 bits in general,
    as a saved model has them.

    Args:
        table: the table, whose codes the module shares.
        mode: ``mean``, ``sum`` or ``max``.
        include_last_offset: whether the last offset is the end of the last bag.
        padding_idx: entries with this id are left out of their bag.
        dtype: of the parameters and of the result; None takes that of the table.
        backend: passed to ``gather_decode``; None chooses by device and dtype.

    Raises:
        ValueError: ``padding_idx`` is out of range, or the mode is unknown.
    """

    def __init__(
        self,
        table: PackedTable,
        *,
        mode: Literal["mean", "sum", "max"] = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        V = table.num_embeddings
        if mode not in ("mean", "sum", "max"):
            raise ValueError(f"mode: expected mean, sum or max, got {mode!r}")
        if padding_idx is not None and not -V <= padding_idx < V:
            raise ValueError(f"padding_idx: expected an id below {V}, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = V, table.embedding_dim
        self.mode, self.include_last_offset = mode, include_last_offset
        self.padding_idx = None if padding_idx is None else padding_idx % V
        self.backend = backend
        self.stored_dtype = table.dtype
        self._width = table.embedding_dim
        self._register(table if dtype is None else table.to(dtype=dtype))

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Return the bags: (B, H) of ids (N,) with offsets (B,), or of ids (B, n).

        Args:
            input: int32 or int64 ids.
            offsets: the place of the first id of every bag, for ids (N,).
            per_sample_weights: factors of the rows, of the shape of ``input``; for ``sum`` only.

        Raises:
            IndexError: an id is negative or not below V.
            ValueError, RuntimeError: as ``F.embedding_bag``.
        """
        distinct, places = torch.unique(input, return_inverse=True)
        rows = self._rows(distinct)
        if len(rows) == 0:  # F.embedding_bag refuses an empty table, even for empty bags
            rows = rows.new_zeros(1, self._width)
        padding = None
        if self.padding_idx is not None:
            present = torch.nonzero(distinct == self.padding_idx).flatten().tolist()
            padding = present[0] if present else None
        return F.embedding_bag(
            places,
            rows,
            None if offsets is None else offsets.long(),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    def stored_table(self) -> PackedTable:
        """Return the table in the dtype in which it is saved."""
        return self.table.to(dtype=self.stored_dtype)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> PackedEmbeddingBag:
        """Return the bag of means whose ``state_dict`` is ``state``.

        Args:
            state: the tensors of the table, and ``_extra_state``.
            dtype: of the parameters and of the result.

        Raises:
            KeyError: a tensor is missing.
            ValueError, TypeError: a tensor was changed, or the tensors contradict each other.
        """
        width, *sums = state["_extra_state"].tolist()
        present = {name: state[name] for name in TENSORS if name in TENSORS[:5] or name in state}
        verify_checksums(present, {n: f"crc32:{each:08x}" for n, each in zip(present, sums, strict=False)})
        tensors: dict[str, Any] = present
        return cls(PackedTable(**tensors, embedding_dim=width), dtype=dtype)

    def get_extra_state(self) -> Tensor:
        """Return what ``from_state`` needs beside the tensors: H, and the CRC-32 of each of them."""
        sums = [checksum(tensor).removeprefix("crc32:") for tensor in self.stored_table().tensors().values()]
        return torch.tensor([self.embedding_dim, *(int(each, 16) for each in sums)])

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the shapes of the tensors are checked when they are copied."""

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, tiers={len(self.tiers)}, mode={self.mode!r}"

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state as a saved model has it: the table includes the changes that are being trained."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            prefix = kwargs.get("prefix", "")
            for name in [each for each in state if each.startswith(f"{prefix}{ADJUSTMENT}.")]:
                del state[name]
            for name, tensor in self.stored_table().tensors().items():
                state[prefix + name] = tensor
        return state
