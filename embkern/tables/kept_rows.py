"""``KeptRowsTable``: what tables share that store some rows and map the ids of all others."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .rows import RowTable, expect_shape

Unknown = Literal["mean", "nearest", "error"]


class Taken(NamedTuple):
    """The map of a table of some of the rows of another one.

    Attributes:
        rows: (K,) int64, the numbers that its kept rows have among those of the other table.
        kept_ids, nearest_kept: its map.
    """

    rows: Tensor
    kept_ids: Tensor
    nearest_kept: Tensor | None


class KeptRowsTable(RowTable):
    """Base of the (V, H) tables that store K rows, in any form, and what the ids of all others get.

    Id i has the kept row k where ``kept_ids[k] == i``; ``unknown`` says what the other ids get, as in
    ``PrunedTable``.

    Attributes:
        kept_ids: (K,) int32, ascending.
        nearest_kept: (max(1, V - K),) int32 with ``nearest``, else None.
        unknown: ``mean``, ``nearest`` or ``error``.
    """

    kept_ids: Tensor
    nearest_kept: Tensor | None
    unknown: Unknown

    @property
    def kept(self) -> int:
        """K, the number of rows that are kept."""
        return len(self.kept_ids)

    def others(self) -> Tensor:
        """Return the ids that are not kept, (V - K,) int64, ascending."""
        return torch.nonzero(~self._known()).flatten()

    def _known(self) -> Tensor:
        """Return which ids (V,) are kept."""
        known = torch.zeros(self.num_embeddings, dtype=torch.bool, device=self.device)
        return known.index_fill(0, self.kept_ids.long(), True)

    def _check_layout(self) -> None:
        V = self.num_embeddings
        if self.unknown not in get_args(Unknown):
            raise ValueError(f"unknown: expected one of {', '.join(get_args(Unknown))}, got {self.unknown!r}")
        if self.kept_ids.dim() != 1 or not 1 <= self.kept <= V:
            raise ValueError(
                f"kept_ids: expected shape (K,) with K of 1 to {V}, got {tuple(self.kept_ids.shape)}"
            )
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
        """Return the numbers of the rows that ids (n,) int64 get, and which ids are kept.

        The number is that of a kept row; with ``mean`` it is K for an id that is not kept, with ``error``
        that of some row.
        """
        below = torch.searchsorted(self.kept_ids, ids.int())  # how many kept ids are smaller
        place = below.clamp_max(self.kept - 1)
        known = self.kept_ids[place] == ids
        if self.nearest_kept is not None:
            other = (ids - below).clamp(0, len(self.nearest_kept) - 1)
            place = torch.where(known, place, self.nearest_kept[other].long())
        elif self.unknown == "mean":
            place = torch.where(known, place, self.kept)
        return place, known

    def places_of_all(self) -> tuple[Tensor, Tensor]:
        """Return ``places(torch.arange(V))``, by writing instead of V searches."""
        known = self._known()
        place = torch.full_like(known, self.kept if self.unknown == "mean" else 0, dtype=torch.int64)
        if self.nearest_kept is not None:
            place = place.masked_scatter(~known, self.nearest_kept.long())
        numbers = torch.arange(self.kept, device=place.device)
        return place.index_copy(0, self.kept_ids.long(), numbers), known

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
        """Return the logits (``*``, V) of hidden states (``*``, H), by one product with the stored rows."""
        place, known = self.places_of_all()
        return self._refused(self._stored_logits(hidden).index_select(-1, place), known)

    def _stored_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the kept rows, and with ``mean`` of the mean row: (``*``, K or K + 1)."""
        raise NotImplementedError

    def _piece_logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        _, known = self.places(torch.arange(first, last, device=self.device))
        return self._refused(super()._piece_logits(hidden, first, last), known)

    def _refused(self, logits: Tensor, known: Tensor) -> Tensor:
        if self.unknown != "error":
            return logits
        return logits.masked_fill(~known, torch.finfo(logits.dtype).min)

    def _taken(self, ids: Tensor) -> Taken:
        """Return the map of the table of the rows ids (n,) int64, in their order, which may repeat.

        Raises:
            ValueError: no row of the table would be kept.
        """
        place, known = self.places(ids)
        if self.unknown == "nearest":  # a row stays on its own where the one nearest to it is not taken
            taken = torch.zeros(self.kept, dtype=torch.bool, device=ids.device)
            taken[place[known]] = True
            known = known | ~taken[place]
        kept, nearest = torch.nonzero(known).flatten(), None
        if not len(kept):
            raise ValueError(f"ids: expected some that are kept, got none among {len(ids)}")
        rows = place[kept]
        if self.unknown == "nearest":
            numbers = torch.zeros(self.kept, dtype=torch.int32, device=ids.device)
            numbers[rows] = torch.arange(len(kept), dtype=torch.int32, device=ids.device)
            nearest = numbers[place[~known]] if len(kept) < len(ids) else numbers[:1] * 0
        return Taken(rows, kept.int(), nearest)
