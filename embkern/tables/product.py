"""``ProductTable``: a table whose sub-vectors are entries of codebooks."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bit_codes import codes_of_rows, packed_bytes, rows_taken
from .rows import RowTable, expect_integer, expect_shape

_CHECKED = 1 << 20  # codes that are checked at a time


@dataclass(frozen=True, eq=False)
class ProductTable(RowTable):
    """A (V, H) table of M codes per row: ``y = scales[i] * cat(codebook_m[codes[i, m]] for m) @ rotation.T``.

    Subspace m are the columns ``H * m // M`` to ``H * (m + 1) // M - 1``, whose widths differ by at most one;
    the codebook of a subspace are its columns of ``codebooks``.

    Attributes:
        codebooks: (K, H) with K of at most ``2**bits``, floating-point.
        packed_codes: the M codes of each row, row by row, as ``bit_codes.pack_codes`` packs them; uint8.
        scales: (V,), or None for none.
        rotation: (H, H), or None for none.
        bits: 1 to 8, of a code.
        subspaces: M.
    """

    kind: ClassVar[str] = "product"
    required: ClassVar[tuple[str, ...]] = ("codebooks", "packed_codes")
    optional: ClassVar[tuple[str, ...]] = ("scales", "rotation")
    setting_names: ClassVar[tuple[str, ...]] = ("bits", "subspaces")
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {"packed_codes": torch.uint8}
    per_row: ClassVar[tuple[str, ...]] = ("scales",)

    codebooks: Tensor
    packed_codes: Tensor
    scales: Tensor | None = None
    rotation: Tensor | None = None
    bits: int = 8
    subspaces: int = 1

    def _check_layout(self) -> None:
        V, H = self.num_embeddings, self.embedding_dim
        expect_integer("bits", self.bits, 1, 8)
        expect_integer("subspaces", self.subspaces, 1, H)
        expect_shape("packed_codes", self.packed_codes, (packed_bytes(V * self.subspaces, self.bits),))
        if self.codebooks.dim() != 2 or not 1 <= len(self.codebooks) <= 2**self.bits:
            raise ValueError(
                f"codebooks: expected shape (K, {H}) with K of 1 to {2**self.bits}, "
                f"got {tuple(self.codebooks.shape)}"
            )
        expect_shape("codebooks", self.codebooks, (len(self.codebooks), H))
        expect_shape("scales", self.scales, (V,))
        expect_shape("rotation", self.rotation, (H, H))

    def _check_values(self) -> None:
        if (K := len(self.codebooks)) == 2**self.bits:
            return
        ids = torch.arange(self.num_embeddings, device=self.device)
        for some in ids.split(max(1, _CHECKED // self.subspaces)):
            largest = int(codes_of_rows(self.packed_codes, some, self.subspaces, self.bits).max())
            if largest >= K:
                raise ValueError(f"packed_codes: expected codes below K = {K}, got {largest}")

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes_of_rows(self.packed_codes, ids, self.subspaces, self.bits)
        subspace = torch.tensor(
            [m for m, (first, last) in enumerate(self.spans()) for _ in range(first, last)], device=ids.device
        )
        rows = self.codebooks.to(dtype).gather(0, codes.long()[:, subspace])
        if self.rotation is not None:
            rows = rows @ self.rotation.to(dtype).t()
        return rows if self.scales is None else rows * self.scales.index_select(0, ids).to(dtype).unsqueeze(1)

    def spans(self) -> list[tuple[int, int]]:
        """Return the first column and the one after the last of every subspace."""
        return spans(self.embedding_dim, self.subspaces)

    def take(self, ids: Tensor) -> ProductTable:
        """Return the table of the rows ids (n,) int64, in their order, which may repeat."""
        return dataclasses.replace(
            self,
            packed_codes=rows_taken(self.packed_codes, ids, self.subspaces, self.bits),
            scales=None if self.scales is None else self.scales[ids],
            num_embeddings=len(ids),
            check=False,
        )


def spans(width: int, subspaces: int) -> list[tuple[int, int]]:
    """Return the bounds of the columns of subspaces whose widths differ by at most one."""
    return list(itertools.pairwise(width * i // subspaces for i in range(subspaces + 1)))
