"""``PrunedTable`` and ``PrunedPackedTable``: some rows of a table, and what the ids of all others get."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.gather_decode import decode_rows
from ..ops.packed_format import CODE_DTYPES, PackedTensors
from ..ops.packed_logits import packed_logits
from .kept_rows import KeptRowsTable, Unknown
from .packed import PackedTable
from .rows import expect_shape


@dataclass(frozen=True, eq=False)
class PrunedTable(KeptRowsTable):
    """A (V, H) table that keeps K rows exactly; ids are mapped to them at run time.

    ``y[i] = kept_rows[k]`` for ``kept_ids[k] == i``. What the other ids get is ``unknown``:

    - ``mean``: one row for all of them, the last of ``kept_rows``;
    - ``nearest``: a kept row for each, number ``nearest_kept[j]`` for the j-th id that is not kept;
    - ``error``: a layer's lookup raises IndexError, as with an id of V or above. Logits of a head are the
      least number of their dtype, so that such a token is never predicted. Decoded rows are zero.

    Attributes:
        kept_rows: (K, H), or (K + 1, H) with ``mean``; floating-point.
        kept_ids: (K,) int32, ascending.
        nearest_kept: (max(1, V - K),) int32 with ``nearest``, else None.
        unknown: ``mean``, ``nearest`` or ``error``.
    """

    kind: ClassVar[str] = "pruned"
    required: ClassVar[tuple[str, ...]] = ("kept_rows", "kept_ids")
    optional: ClassVar[tuple[str, ...]] = ("nearest_kept",)
    setting_names: ClassVar[tuple[str, ...]] = ("unknown",)
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {"kept_ids": torch.int32, "nearest_kept": torch.int32}

    kept_rows: Tensor
    kept_ids: Tensor
    nearest_kept: Tensor | None = None
    unknown: Unknown = "mean"

    def _check_layout(self) -> None:
        super()._check_layout()
        expect_shape("kept_rows", self.kept_rows, (self.kept + (self.unknown == "mean"), self.embedding_dim))

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        place, known = self.places(ids)
        rows = self.kept_rows.index_select(0, place).to(dtype)
        return rows if self.unknown != "error" else rows * known.unsqueeze(1)

    def _stored_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.kept_rows.to(hidden.dtype))

    def take(self, ids: Tensor) -> PrunedTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        taken = self._taken(ids)
        rows = self.kept_rows[taken.rows]
        if self.unknown == "mean":
            rows = torch.cat([rows, self.kept_rows[-1:]])
        return dataclasses.replace(
            self,
            kept_rows=rows,
            kept_ids=taken.kept_ids,
            nearest_kept=taken.nearest_kept,
            num_embeddings=len(ids),
            check=False,
        )


@dataclass(frozen=True, eq=False)
class PrunedPackedTable(KeptRowsTable):
    """A (V, H) table of which K rows are a packed table; ids are mapped to them at run time.

    ``y[i] = packed.decode(k)`` for ``kept_ids[k] == i``, where ``packed`` is the ``PackedTable`` of the K
    rows. The other ids get ``mean_row`` if ``unknown`` is ``mean``, and a kept row each if it is ``nearest``;
    ``error`` is as in ``PrunedTable``. They take no codes, scales or directory.

    Attributes:
        scales, records, directory, tiers, levels, basis, offset: the tensors of the packed table.
        kept_ids: (K,) int32, ascending.
        mean_row: (H,) with ``mean``, else None.
        nearest_kept: (max(1, V - K),) int32 with ``nearest``, else None.
        unknown: ``mean``, ``nearest`` or ``error``.
    """

    kind: ClassVar[str] = "pruned_packed"
    required: ClassVar[tuple[str, ...]] = ("scales", "records", "directory", "tiers", "levels", "kept_ids")
    optional: ClassVar[tuple[str, ...]] = ("basis", "offset", "mean_row", "nearest_kept")
    setting_names: ClassVar[tuple[str, ...]] = ("unknown",)
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {
        **{name: dtypes[0] for name, dtypes in CODE_DTYPES.items()},
        "kept_ids": torch.int32,
        "nearest_kept": torch.int32,
    }
    per_row: ClassVar[tuple[str, ...]] = ("scales",)

    scales: Tensor
    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    kept_ids: Tensor
    basis: Tensor | None = None
    offset: Tensor | None = None
    mean_row: Tensor | None = None
    nearest_kept: Tensor | None = None
    unknown: Unknown = "mean"

    @property
    def packed(self) -> PackedTable:
        """The packed table (K, H) of the kept rows, which shares memory; it is not validated."""
        return PackedTable(*self._packed_tensors(), embedding_dim=self.embedding_dim, check=False)

    def _packed_tensors(self) -> PackedTensors:
        codes = (self.records, self.directory, self.tiers, self.levels)
        return PackedTensors(*codes, self.scales, self.basis, self.offset)

    def _check_layout(self) -> None:
        super()._check_layout()
        expect_shape("scales", self.scales, (self.kept,))
        if (self.mean_row is not None) != (self.unknown == "mean"):
            raise ValueError(f"mean_row: expected with unknown='mean' only, got unknown={self.unknown!r}")
        expect_shape("mean_row", self.mean_row, (self.embedding_dim,))
        self.packed.validate()

    def parts_of(self, ids: Tensor) -> Tensor:
        """Return the numbers of the scales of ids (n,) int64; with ``mean``, of some row for the others."""
        return self.places(ids)[0].clamp_max(self.kept - 1)

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        place, known = self.places(ids)
        rows = decode_rows(place.clamp_max(self.kept - 1), self._packed_tensors(), self.embedding_dim)
        if self.unknown == "nearest":
            return rows
        instead = (
            torch.zeros((), dtype=rows.dtype, device=rows.device) if self.mean_row is None else self.mean_row
        )
        if torch.compiler.is_compiling() or not rows.is_cpu:  # a mask as an index waits for the device
            return torch.where(known.unsqueeze(1), rows, instead)
        return rows.index_put_((~known,), instead)  # takes 5 us for 512 rows of 384, where 94

    def _stored_logits(self, hidden: Tensor) -> Tensor:
        logits = packed_logits(hidden, *self._packed_tensors())
        if self.mean_row is None:
            return logits
        of_mean = F.linear(hidden, self.mean_row.to(hidden.dtype).unsqueeze(0))
        return torch.cat([logits, of_mean.to(logits.dtype)], -1)

    def take(self, ids: Tensor) -> PrunedPackedTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        taken = self._taken(ids)
        packed: dict[str, Any] = self.packed.take(taken.rows).tensors()
        return dataclasses.replace(
            self,
            **packed,
            kept_ids=taken.kept_ids,
            nearest_kept=taken.nearest_kept,
            num_embeddings=len(ids),
            check=False,
        )
