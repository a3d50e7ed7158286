"""``TensorTrainTable``: a table that is a chain of small tensors, a matrix product operator."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .rows import LARGEST, RowTable, expect_integer, expect_shape

_LEFT_VALUES = 1 << 22  # values of the middle core that are gathered at a time


@dataclass(frozen=True, eq=False)
class TensorTrainTable(RowTable):
    """A (V, H) table of two or three cores and a scale per row.

    Row i has the digits ``(i1, i2, i3)`` in the mixed radix ``rows``, column j the digits ``(j1, j2, j3)`` in
    ``columns``. The products of ``rows`` and ``columns`` are at least V, and H. With cores of shapes (v1, h1,
    r1), (r1, v2, h2, r2) and (r2, v3, h3), which are stored as matrices::

        y[i, j] = scales[i] * core_1[i1, j1] @ core_2[:, i2, j2] @ core_3[:, i3, j3]

    Of two cores, ``core_2`` is None.

    Attributes:
        core_1: (v1 h1, r1), floating-point.
        core_3: (r2, v3 h3).
        core_2: (r1, v2 h2 r2), or None.
        scales: (V,), or None for none.
        rows: factors of the number of rows.
        columns: factors of H.
    """

    kind: ClassVar[str] = "tensor_train"
    required: ClassVar[tuple[str, ...]] = ("core_1", "core_3")
    optional: ClassVar[tuple[str, ...]] = ("core_2", "scales")
    setting_names: ClassVar[tuple[str, ...]] = ("rows", "columns")
    per_row: ClassVar[tuple[str, ...]] = ("scales",)

    core_1: Tensor
    core_3: Tensor
    core_2: Tensor | None = None
    scales: Tensor | None = None
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)

    def _check_layout(self) -> None:
        V, H, cores = self.num_embeddings, self.embedding_dim, 2 if self.core_2 is None else 3
        for name, factors in (("rows", self.rows), ("columns", self.columns)):
            if not isinstance(factors, list) or len(factors) != cores:
                raise ValueError(f"{name}: expected a factor for each of {cores} cores, got {factors!r}")
            for each in factors:
                expect_integer(name, each, 1, LARGEST)
        if math.prod(self.rows) < V or math.prod(self.columns) != H:
            raise ValueError(
                f"rows, columns: expected products of at least {V} and of {H}, "
                f"got {self.rows} and {self.columns}"
            )
        first, last = self.core_1, self.core_3
        if first.dim() != 2 or last.dim() != 2:
            raise ValueError(
                f"core_1, core_3: expected matrices, got {tuple(first.shape)}, {tuple(last.shape)}"
            )
        expect_shape("core_1", first, (self.rows[0] * self.columns[0], first.shape[1]))
        expect_shape("core_3", last, (len(last), self.rows[-1] * self.columns[-1]))
        if self.core_2 is not None:
            width = self.rows[1] * self.columns[1] * len(last)
            expect_shape("core_2", self.core_2, (first.shape[1], width))
        elif first.shape[1] != len(last):
            raise ValueError(
                f"core_1, core_3: expected one rank, got {tuple(first.shape)}, {tuple(last.shape)}"
            )
        expect_shape("scales", self.scales, (V,))

    def _decoded(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        per_row = 1 if self.core_2 is None else self.core_2.numel() // self.rows[1]
        parts = ids.split(max(1, _LEFT_VALUES // per_row)) if len(ids) else [ids]
        return torch.cat([self._unscaled(some, dtype) for some in parts]) * self._scales_of(ids, dtype)

    def _unscaled(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the products of the cores for rows ids (n,), (n, H)."""
        core_1, core_3 = self.core_1.to(dtype), self.core_3.to(dtype)
        v, h, (r1, r2) = self.rows, self.columns, (core_1.shape[1], len(core_3))
        prefix, last = ids // v[-1], ids % v[-1]
        if self.core_2 is None:
            left = core_1.view(v[0], h[0], r1)[prefix]
        else:
            first = core_1.view(v[0], h[0], r1)[prefix // v[1]]
            middle = self.core_2.to(dtype).view(r1, v[1], h[1] * r2)[:, prefix % v[1]].transpose(0, 1)
            left = (first @ middle).view(len(ids), h[0] * h[1], r2)
        return (left @ core_3.view(r2, v[-1], h[-1])[:, last].transpose(0, 1)).flatten(1)

    def _scales_of(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return torch.ones((), dtype=dtype, device=ids.device)
        return self.scales.index_select(0, ids).to(dtype).unsqueeze(1)

    def row_range(self, first: int, last: int) -> Tensor:
        """Return the rows ``first`` to ``last - 1``: (last - first, H).

        Consecutive rows share the products of the first cores, which are computed once for them.
        """
        ids = torch.arange(first, last, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self._range(ids, first, last).to(self.dtype)

    def _range(self, ids: Tensor, first: int, last: int) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        core_1, core_3 = self.core_1.to(dtype), self.core_3.to(dtype)
        v, h, (r1, r2) = self.rows, self.columns, (core_1.shape[1], len(core_3))
        begin, end = first // v[-1], -(-last // v[-1])  # of the prefixes, all digits but the last
        if self.core_2 is None:
            left = core_1.view(v[0], h[0] * r1)[begin:end].reshape(-1, r1)
        else:
            start, stop = begin // v[1], -(-end // v[1])
            products = core_1.view(v[0], h[0], r1)[start:stop] @ self.core_2.to(dtype)
            products = products.view(-1, h[0], v[1], h[1] * r2).transpose(1, 2).flatten(0, 1)
            left = products[begin - start * v[1] : end - start * v[1]].reshape(-1, r2)
        rows = (left @ core_3).view(end - begin, -1, v[-1], h[-1]).transpose(1, 2).reshape(-1, math.prod(h))
        return rows[first - begin * v[-1] : last - begin * v[-1]] * self._scales_of(ids, dtype)

    def take(self, ids: Tensor) -> TensorTrainTable:
        """Return the table of the rows ids (n,) int64, which are the first ones: cores have no other rows.

        Raises:
            ValueError: they are not the first rows in order.
        """
        if len(ids) > self.num_embeddings or not torch.equal(ids.cpu(), torch.arange(len(ids))):
            raise ValueError(
                "num_embeddings: a tensor train cannot hold new rows; dequantize the model, resize it, and "
                "compress it again"
            )
        scales = None if self.scales is None else self.scales[ids]
        return dataclasses.replace(self, scales=scales, num_embeddings=len(ids), check=False)
