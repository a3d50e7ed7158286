"""PackedTable: a table whose rows are quantised at different bit rates, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.tensor_format import TensorFormat
from ..ops.first_edition import is_first_edition
from ..ops.gather_decode import decode_rows
from ..ops.packed_codes import GROUP
from ..ops.packed_format import (
    PackedTensors,
    Tier,
    check_table,
    described_tiers,
    lay_out,
    rows_taken,
    tiers_of_rows,
)
from .factors import check_floating

TENSORS = PackedTensors._fields
FORMAT = TensorFormat(
    "embkern.packed/2",
    "a packed table",
    required=TENSORS[:5],
    optional=TENSORS[5:],
    settings=("embedding_dim",),
    checked=("embedding_dim",),  # without basis and offset, no tensor has H columns
    earlier=("embkern.packed/1",),
)
_FIRST_FORMAT = replace(FORMAT, name=FORMAT.earlier[0])
_DECODED_ROWS = 8192  # rows that to_dense decodes at a time


@dataclass(frozen=True, eq=False)
class PackedTable:
    """A (V, H) table whose rows are quantised, each at the rate of its tier.

    ``row[i] = scales[i] * v + offset`` where v is the values that record i decodes to, or ``values @ basis``
    if the tier holds coefficients.

    Records are stored in the order of the ids. The directory has 4 bits per row for its tier, which
    determines the length of the record, and one word per 32 rows for the start of the first of their records.
    Codes of up to 4 bits form a ring of 2 bits a step, in which 12 bits select the level of a value
    (``embkern.ops.packed_codes``); wider codes are bit planes of groups of 32 values.

    Tables of the first edition of the format, which have levels of int16, are looked up by torch alone, which
    is many times slower, and cannot get new rows: compress the dense table again.

    The table is validated when it is made, unless with ``check=False``, for tensors that are known to be
    valid. Memory safety does not depend on it: the kernels check every access.

    Attributes:
        records, directory, tiers, levels: the codes and their layout, as ``embkern.ops.gather_decode`` takes
            them; integers, which no cast of a model changes.
        scales: (V,).
        basis: (K, H) or None.
        offset: (H,) or None.
        embedding_dim: H.
        facts: what the method reports about the result (JSON values); not saved.

    Raises:
        ValueError: the shapes do not fit each other, or directory, tiers and records contradict each other.
        TypeError: a dtype is wrong.
    """

    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    scales: Tensor
    basis: Tensor | None = None
    offset: Tensor | None = None
    embedding_dim: int = 0
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    check: InitVar[bool] = field(default=True, kw_only=True)

    def __post_init__(self, check: bool) -> None:
        if check:
            self.validate()

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the tensors describe a table.

        This reads tiers and directory; on the meta device only shapes and dtypes are checked.
        """
        check_table(self.packed_tensors(), self.embedding_dim)

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows."""
        return self.scales.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of scales, basis and offset, and of the decoded rows."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors (a file adds a header of a few hundred bytes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def packed_tensors(self) -> PackedTensors:
        """Return all tensors in the order of the format."""
        codes = (self.records, self.directory, self.tiers, self.levels)
        return PackedTensors(*codes, self.scales, self.basis, self.offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        return dict(self.packed_tensors().named())

    def described_tiers(self) -> list[Tier]:
        """Return the tiers as Python values, without trailing groups of 0 bits."""
        return described_tiers(self.tiers)

    def tier_of_rows(self) -> Tensor:
        """Return the tier of every row, (V,) int64."""
        return tiers_of_rows(self.directory)[: self.num_embeddings]

    def decode(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape): (``*``, H)."""
        return decode_rows(ids, self.packed_tensors(), self.embedding_dim)

    def coefficients(self, ids: Tensor) -> Tensor:
        """Return the coefficients (n, K) of rows that have some, times their scales.

        ids: (n,). Raises ValueError without a basis.
        """
        if self.basis is None:
            raise ValueError("coefficients: expected a table with a basis")
        plain, size = self.tiers.clone(), len(self.basis)
        plain[:, 0] = 0  # so that the coefficients are decoded like the values of a row
        width = GROUP * (plain.shape[1] - 1)
        codes = (self.records, self.directory, plain, self.levels)
        values = decode_rows(ids, PackedTensors(*codes, self.scales, None, None), width)
        return values if width == size else F.pad(values[:, :size], (0, max(0, size - width)))

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H)."""
        ids = torch.arange(self.num_embeddings, device=self.scales.device)
        return torch.cat([self.decode(some) for some in ids.split(_DECODED_ROWS)])

    def take(self, ids: Tensor) -> PackedTable:
        """Return the table of the rows ids (n,) int64, n of at least 1, in their order, which may repeat."""
        records, directory = rows_taken(self.packed_tensors(), ids)
        return replace(self, records=records, directory=directory, scales=self.scales[ids], check=False)

    def to(self, *args: Any, **kwargs: Any) -> PackedTable:
        """Return the table moved, and its floating-point tensors cast, as ``Tensor.to`` does.

        Raises:
            TypeError: the dtype is not floating-point.
        """
        moved: dict[str, Any] = {name: each.to(*args, **kwargs) for name, each in self.tensors().items()}
        check_floating(moved["scales"].dtype)
        for name in TENSORS[:4]:  # codes keep their dtype
            moved[name] = getattr(self, name).to(moved[name].device)
        return PackedTable(**moved, embedding_dim=self.embedding_dim, facts=self.facts, check=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to one safetensors file; an existing file is replaced atomically."""
        edition = _FIRST_FORMAT if is_first_edition(self.levels) else FORMAT
        edition.save(path, self.tensors(), embedding_dim=self.embedding_dim)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedTable:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of a packed table.
        """
        return FORMAT.load(path, lambda tensors, settings: cls(**tensors, **settings))


def pack(
    tier_of: Tensor,
    codes: dict[int, Tensor],
    tiers: list[Tier],
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    embedding_dim: int,
    *,
    check: bool = True,
) -> PackedTable:
    """Return the packed table of codes.

    Args:
        tier_of: (V,) int64, the tier of every row.
        codes: by tier, the codes (n, 32 G) uint8 of its n rows in the order of their ids; tiers without rows
            or bits may be missing.
        tiers: up to 16.
        levels: (17, 16) int8, as ``embkern.ops.gather_decode`` takes them.
        scales: (V,), floating-point.
        basis: (K, H) in the dtype of scales, or None.
        offset: (H,) in the dtype of scales, or None.
        embedding_dim: H.
        check: whether the table is validated.
    """
    parts = ((index, torch.nonzero(tier_of == index).flatten()) for index in range(len(tiers)))
    used = ((index, rows, codes[index]) for index, rows in parts if len(rows) and tiers[index].words)
    return PackedTable(
        *lay_out(tier_of, used, tiers),
        levels,
        scales.contiguous(),
        None if basis is None else basis.contiguous(),
        offset,
        embedding_dim,
        check=check,
    )
