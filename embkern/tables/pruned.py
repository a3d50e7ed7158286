"""``PrunedTable``: some rows of a table as they are, and what the ids of all others get."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import RowTable, expect_shape

Unknown = Literal["mean", "nearest", "error"]


@dataclass(frozen=True, eq=False)
class PrunedTable(RowTable):
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

    @property
    def kept(self) -> int:
        """K, the number of rows that are kept."""
        return len(self.kept_ids)

    def _check_layout(self) -> None:
        V, H = self.num_embeddings, self.embedding_dim
        if self.unknown not in get_args(Unknown):
            raise ValueError(f"unknown: expected one of {', '.join(get_args(Unknown))}, got {self.unknown!r}")
        if self.kept_ids.dim() != 1 or not 1 <= self.kept <= V:
            raise ValueError(
                f"kept_ids: expected shape (K,) with K of 1 to {V}, got {tuple(self.kept_ids.shape)}"
            )
        expect_shape("kept_rows", self.kept_rows, (self.kept + (self.unknown == "mean"), H))
        if (self.nearest_kept is not None) != (self.unknown == "nearest"):
            raise ValueError(
                f"nearest_kept: expected with unknown='nearest' only, got unknown={self.unknown!r}"
            )
        expect_shape("nearest_kept", self.nearest_kept, (max(1, V - self.kept),))

    def _check_values(self) -> None:
        ids = self.kept_ids
        if int(ids[0]) < 0 or int(ids[-1]) >= self.num_embeddings or not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError(f"kept_ids: expected ascending ids below {self.num_embeddings}, got others")
        if self.nearest_kept is not None:
            least, most = (int(each) for each in self.nearest_kept.aminmax())
            if least < 0 or most >= self.kept:
                raise ValueError(f"nearest_kept: expected 0 to {self.kept - 1}, got {least} to {most}")

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of the rows that ids (n,) int64 get in ``kept_rows``, and which ids are kept.

        With ``error`` the number for an id that is not kept is that of some row.
        """
        below = torch.searchsorted(self.kept_ids, ids.int())  # how many kept ids are smaller
        place = below.clamp_max(self.kept - 1)
        known = self.kept_ids[place] == ids
        if self.nearest_kept is not None:
            other = (ids - below).clamp(0, len(self.nearest_kept) - 1)
            place = torch.where(known, place, self.nearest_kept[other].long())
        elif self.unknown == "mean":
            place = torch.where(known, place, len(self.kept_rows) - 1)
        return place, known

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        place, known = self.places(ids)
        rows = self.kept_rows.index_select(0, place).to(dtype)
        return rows if self.unknown != "error" else rows * known.unsqueeze(1)

    def check_known(self, ids: Tensor) -> None:
        """Raise IndexError if ``unknown`` is ``error`` and an id is not kept (on CUDA a device assertion)."""
        if self.unknown != "error":
            return
        known = self.places(ids.reshape(-1).long())[1]
        if ids.is_cuda or torch.compiler.is_compiling():
            torch._assert_async(known.all(), "ids: expected tokens that were kept (unknown='error')")
        elif len(lost := ids.reshape(-1)[~known]):
            raise IndexError(f"ids: expected tokens that were kept (unknown='error'), got {int(lost[0])}")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (``*``, V) of hidden states (``*``, H), by one product with the kept rows."""
        place, known = self.places(torch.arange(self.num_embeddings, device=self.device))
        found = F.linear(hidden, self.kept_rows.to(hidden.dtype)).index_select(-1, place)
        return self._refused(found, known)

    def _piece_logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        _, known = self.places(torch.arange(first, last, device=self.device))
        return self._refused(super()._piece_logits(hidden, first, last), known)

    def _refused(self, logits: Tensor, known: Tensor) -> Tensor:
        if self.unknown != "error":
            return logits
        return logits.masked_fill(~known, torch.finfo(logits.dtype).min)

    def take(self, ids: Tensor) -> PrunedTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        place, known = self.places(ids)
        if self.unknown == "nearest":  # a row stays on its own where the one nearest to it is not taken
            taken = torch.zeros(self.kept, dtype=torch.bool, device=ids.device)
            taken[place[known]] = True
            known = known | ~taken[place]
        kept = torch.nonzero(known).flatten()
        rows, nearest = self.kept_rows[place[kept]], None
        if self.unknown == "mean":
            rows = torch.cat([rows, self.kept_rows[-1:]])
        if self.unknown == "nearest":
            numbers = torch.zeros(self.kept, dtype=torch.int32, device=ids.device)
            numbers[place[kept]] = torch.arange(len(kept), dtype=torch.int32, device=ids.device)
            nearest = numbers[place[~known]] if len(kept) < len(ids) else numbers[:1] * 0
        return dataclasses.replace(
            self,
            kept_rows=rows,
            kept_ids=kept.int(),
            nearest_kept=nearest,
            num_embeddings=len(ids),
            check=False,
        )
