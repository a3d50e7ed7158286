"""``ScalarTable``: a table whose values are quantised one by one, with a scale per group of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bit_codes import codes_of_rows, packed_bytes, rows_taken
from .rows import LARGEST, RowTable, expect_integer, expect_shape


@dataclass(frozen=True, eq=False)
class ScalarTable(RowTable):
    """A (V, H) table of codes of 1 to 8 bits: ``y = scales[i, g] * points[code] + minima[i, g]``.

    Group g of a row are its values ``g * group`` to ``(g + 1) * group - 1``; the last may be shorter.

    Attributes:
        scales: (V, G), floating-point, for G groups.
        packed_codes: the codes of all values, row by row, as ``bit_codes.pack_codes`` packs them; uint8.
        minima: (V, G), or None for none.
        points: (2**bits,), the values of the codes, or None where these are the codes themselves.
        bits: 1 to 8, of a code.
        group: number of values that share a scale.
    """

    kind: ClassVar[str] = "scalar"
    required: ClassVar[tuple[str, ...]] = ("scales", "packed_codes")
    optional: ClassVar[tuple[str, ...]] = ("minima", "points")
    setting_names: ClassVar[tuple[str, ...]] = ("bits", "group")
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {"packed_codes": torch.uint8}
    per_row: ClassVar[tuple[str, ...]] = ("scales", "minima")

    scales: Tensor
    packed_codes: Tensor
    minima: Tensor | None = None
    points: Tensor | None = None
    bits: int = 8
    group: int = 0

    def _check_layout(self) -> None:
        V, H = self.num_embeddings, self.embedding_dim
        expect_integer("bits", self.bits, 1, 8)
        expect_integer("group", self.group, 1, LARGEST)
        expect_shape("packed_codes", self.packed_codes, (packed_bytes(V * H, self.bits),))
        expect_shape("scales", self.scales, (V, -(-H // self.group)))
        expect_shape("minima", self.minima, self.scales.shape)
        expect_shape("points", self.points, (2**self.bits,))

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes_of_rows(self.packed_codes, ids, self.embedding_dim, self.bits)
        values = codes.to(dtype) if self.points is None else self.points.to(dtype)[codes]
        values = values * self._by_column(self.scales, ids, dtype)
        return values if self.minima is None else values + self._by_column(self.minima, ids, dtype)

    def _by_column(self, of_groups: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers of the groups of some rows for every column, (n, H)."""
        columns = torch.arange(self.embedding_dim, device=ids.device) // self.group
        return of_groups.index_select(0, ids).to(dtype)[:, columns]

    def take(self, ids: Tensor) -> ScalarTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        return dataclasses.replace(
            self,
            packed_codes=rows_taken(self.packed_codes, ids, self.embedding_dim, self.bits),
            scales=self.scales[ids],
            minima=None if self.minima is None else self.minima[ids],
            num_embeddings=len(ids),
            check=False,
        )
