"""PackedTable: a table whose rows are quantised at different rates, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..io.tensor_format import TensorFormat
from ..ops.gather_decode import decode_rows
from ..ops.packed_format import PackedTensors, Tier, check_table, described_tiers, lay_out, tiers_of_rows

TENSORS = PackedTensors._fields
FORMAT = TensorFormat(
    "embkern.packed/1",
    "a packed table",
    required=TENSORS[:5],
    optional=TENSORS[5:],
    settings=("embedding_dim",),
    checked=("embedding_dim",),  # not all of the tensors show it
)
_DECODED_ROWS = 8192  # at a time, by to_dense


@dataclass(frozen=True, eq=False)
class PackedTable:
    """A (V, H) table whose rows are quantised, each at the rate of its tier.

    ``row[i] = scales[i] * v + offset`` where v is the row of values that record i decodes to, or
    ``values @ basis`` if the tier holds coefficients.

    Rows lie one after the other in the order of their ids, so that no map from ids to places is stored: 4
    bits a row name its tier, the tier says how long the record is, and every 32 rows have a word that says
    where they begin. A record is bit planes of groups of 32 values: bit i of a group's word p is bit p of the
    code of value i. Codes of up to 4 bits go through a trellis: levels by their state, which is the code and
    those of the values before it in the group (``embkern.ops.packed_format.trellis_states``).

    Attributes:
        records, directory, tiers, levels: the codes and what they mean, as ``embkern.ops.gather_decode``
            takes them; whole numbers, which no cast of a model touches.
        scales: (V,).
        basis: (K, H) or None.
        offset: (H,) or None.
        embedding_dim: H.
        facts: what the method says of the result (JSON values); not saved.

    Raises:
        ValueError: shapes do not fit each other, or the records do not fill what the directory describes.
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

    def __post_init__(self) -> None:
        check_table(self.packed_tensors(), self.embedding_dim)

    @property
    def num_embeddings(self) -> int:
        """V, the rows of the table."""
        return self.scales.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scales, basis and offset, and of the decoded rows."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as stored (a file adds a header of some hundred bytes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def packed_tensors(self) -> PackedTensors:
        """Return all tensors in the order of the format."""
        codes = (self.records, self.directory, self.tiers, self.levels)
        return PackedTensors(*codes, self.scales, self.basis, self.offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        return dict(self.packed_tensors().named())

    def described_tiers(self) -> list[Tier]:
        """Return the tiers as Python values."""
        return described_tiers(self.tiers)

    def tier_of_rows(self) -> Tensor:
        """Return the tier (V,) of every row."""
        return tiers_of_rows(self.directory)[: self.num_embeddings]

    def decode(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape): (``*``, H)."""
        return decode_rows(ids, self.packed_tensors(), self.embedding_dim)

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H)."""
        ids = torch.arange(self.num_embeddings, device=self.scales.device)
        return torch.cat([self.decode(some) for some in ids.split(_DECODED_ROWS)])

    def to(self, *args: Any, **kwargs: Any) -> PackedTable:
        """Return the table moved, and its floating-point tensors cast, as ``Tensor.to`` does."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}
        for name in TENSORS[:4]:  # codes keep their dtype
            moved[name] = getattr(self, name).to(moved[name].device)
        return PackedTable(**moved, embedding_dim=self.embedding_dim, facts=self.facts)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table to one safetensors file; a file already there is replaced whole or not at all."""
        FORMAT.save(path, self.tensors(), embedding_dim=self.embedding_dim)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PackedTable:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
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
) -> PackedTable:
    """Lay codes out as records.

    Args:
        tier_of: (V,) int64, the tier of every row.
        codes: per tier with rows, the codes (rows, 32 groups) uint8 of its rows in the order of their ids.
        tiers: up to 16.
        levels: (4, 128) of the format, int16.
        scales: (V,), in one floating-point dtype with
        basis: (K, H) or None, and
        offset: (H,) or None.
        embedding_dim: H.
    """
    return PackedTable(
        *lay_out(tier_of, codes, tiers),
        levels,
        scales.contiguous(),
        None if basis is None else basis.contiguous(),
        offset,
        embedding_dim,
    )
