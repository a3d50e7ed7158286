"""PackedTable: a table whose rows are quantised at different rates, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.tensor_format import TensorFormat
from ..ops.gather_decode import check_packed, gather_decode
from ..ops.reference import GROUP, LEVEL_BITS, STATES

TENSORS = ("records", "directory", "tiers", "levels", "scales", "basis", "offset")
FORMAT = TensorFormat(
    "embkern.packed/1",
    "a packed table",
    required=TENSORS[:5],
    optional=TENSORS[5:],
    settings=("embedding_dim",),
    checked=("embedding_dim",),  # not all of the tensors show it
)
MAX_TIERS, MAX_BITS = 16, 8
_DECODED_ROWS = 8192  # at a time, by to_dense


class Tier(NamedTuple):
    """``bits[g]`` per value of group g, of the row itself or of its coefficients in the basis."""

    transform: bool
    bits: tuple[int, ...]

    @property
    def words(self) -> int:
        """Words of 32 bits that a record takes."""
        return sum(self.bits)

    def __str__(self) -> str:
        """Return a short name: ``4 bits``, ``basis 3-2-1-1``."""
        if not self.transform and len(set(self.bits)) == 1:
            return f"{self.bits[0]} bits"
        if not self.bits:
            return "0 bits"
        return ("basis " if self.transform else "") + "-".join(map(str, self.bits))


@dataclass(frozen=True, eq=False)
class PackedTable:
    """A (V, H) table whose rows are quantised, each at the rate of its tier.

    ``row[i] = scales[i] * v + offset`` where v is the row of values that record i decodes to, or
    ``values @ basis`` if the tier holds coefficients.

    Rows lie one after the other in the order of their ids, so that no map from ids to places is stored: 4
    bits a row name its tier, the tier says how long the record is, and every 32 rows have a word that says
    where they begin. A record is bit planes of groups of 32 values: bit i of a group's word p is bit p of the
    code of value i. Codes of up to 4 bits go through a trellis: levels by their state, which is the code and
    those of the values before it in the group (``embkern.ops.reference.trellis_states``).

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
        check_packed(
            self.records,
            self.directory,
            self.tiers,
            self.levels,
            self.scales,
            self.basis,
            self.offset,
            self.embedding_dim,
        )
        if not self.scales.is_floating_point():
            raise TypeError(f"scales: expected a floating-point dtype, got {self.scales.dtype}")
        self._check_width()
        if not self.scales.is_meta:
            self._check_ranges()

    def _check_width(self) -> None:
        """Bound H by the tensors: basis and offset have H columns; without both, tiers have H values."""
        if type(self.embedding_dim) is not int or self.embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected a positive integer, got {self.embedding_dim!r}")
        if self.basis is not None and self.basis.shape[0] == 0:
            raise ValueError("basis: expected (K, H) with K of at least 32, or None, got no rows")
        widest = GROUP * (self.tiers.shape[1] - 1)
        if self.basis is None and self.offset is None and self.embedding_dim > widest:
            raise ValueError(
                f"embedding_dim: expected at most {widest}, the values that tiers describe, "
                f"got {self.embedding_dim}"
            )

    def _check_ranges(self) -> None:
        if int(self.tiers[:, 1:].max()) > MAX_BITS or int(self.tiers[:, 0].max()) > 1:
            raise ValueError(f"tiers: expected 0 or 1, then 0 to {MAX_BITS} bits, got {self.tiers.tolist()}")
        size = self.basis.shape[0] if self.basis is not None else 0
        groups = -(-self.embedding_dim // GROUP)
        tiers = self.described_tiers()
        for tier in tiers:
            most = size // GROUP if tier.transform else groups
            if any(tier.bits[most:]):
                raise ValueError(f"tiers: expected at most {most} groups, got {tier}")
        tier_of = self.tier_of_rows()
        if int(tier_of.max()) >= len(self.tiers):
            raise ValueError(f"directory: expected tiers below {len(self.tiers)}, got {int(tier_of.max())}")
        words = words_of_rows(tier_of, tiers)
        starts = words.cumsum(0) - words
        if not torch.equal(self.directory[:, 0].long(), starts[::GROUP]):
            raise ValueError("directory: the places of the records do not follow from the rows' tiers")
        if (expected := max(1, int(words.sum()))) != len(self.records):
            raise ValueError(f"records: expected {expected} words, got {len(self.records)}")

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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def described_tiers(self) -> list[Tier]:
        """Return the tiers as Python values."""
        return [
            Tier(bool(transform), tuple(bits[: max((i + 1 for i, b in enumerate(bits) if b), default=0)]))
            for transform, *bits in self.tiers.tolist()
        ]

    def tier_of_rows(self) -> Tensor:
        """Return the tier (V,) of every row."""
        return tiers_of_rows(self.directory)[: self.num_embeddings]

    def decode(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape): (``*``, H)."""
        tensors = (getattr(self, name) for name in TENSORS)
        return gather_decode(ids, *tensors, embedding_dim=self.embedding_dim)

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


def packed_bytes(rows: Tensor, tiers: list[Tier], floats: int, basis_rows: int, embedding_dim: int) -> int:
    """Bytes of a table with ``rows[t]`` rows in tier t and floating-point values of ``floats`` bytes."""
    total = int(rows.sum())
    words = max(1, sum(int(count) * tier.words for count, tier in zip(rows.tolist(), tiers, strict=True)))
    groups = max([1, *(len(tier.bits) for tier in tiers)])
    fixed = len(tiers) * (1 + groups) + LEVEL_BITS * STATES * 2
    return 4 * words + 20 * -(-total // GROUP) + fixed + floats * (total + basis_rows * embedding_dim)


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
    words = words_of_rows(tier_of, tiers)
    starts = words.cumsum(0) - words
    records = torch.zeros(max(1, int(words.sum())), dtype=torch.int32)
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tier_of == index).flatten()
        if len(rows) and tier.words:
            planes = bit_planes(codes[index], tier)
            records[(starts[rows].unsqueeze(1) + torch.arange(tier.words)).flatten()] = planes.flatten()
    groups = max([1, *(len(tier.bits) for tier in tiers)])
    described = [[int(t.transform), *t.bits, *[0] * (groups - len(t.bits))] for t in tiers]
    return PackedTable(
        records,
        directory_of(tier_of, tiers),
        torch.tensor(described, dtype=torch.uint8),
        levels,
        scales.contiguous(),
        None if basis is None else basis.contiguous(),
        offset,
        embedding_dim,
    )


def words_of_rows(tier_of: Tensor, tiers: list[Tier]) -> Tensor:
    """Words (V,) int64 of the rows' records."""
    return torch.tensor([tier.words for tier in tiers], device=tier_of.device)[tier_of]


def directory_of(tier_of: Tensor, tiers: list[Tier]) -> Tensor:
    """Words (ceil(V / 32), 5) of the rows' tiers (V,): where 32 records begin, then 4 bits a row."""
    words = words_of_rows(tier_of, tiers)
    starts = (words.cumsum(0) - words)[::GROUP]
    nibbles = F.pad(tier_of, (0, -len(tier_of) % GROUP)).view(-1, 4, 8) << torch.arange(0, 32, 4)
    return _wrapped(torch.cat([starts.unsqueeze(1), nibbles.sum(2)], 1))


def tiers_of_rows(directory: Tensor) -> Tensor:
    """Tiers (32 blocks,) int64 that a directory names; those beyond the last row are 0."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=directory.device)
    return ((directory[:, 1:, None] >> shifts) & 15).flatten().long()


def bit_planes(codes: Tensor, tier: Tier) -> Tensor:
    """Records (n, W) of codes (n, 32 groups): bit i of a group's word p is bit p of the code of value i."""
    lanes, planes = torch.arange(GROUP), [torch.zeros(len(codes), 0, dtype=torch.int64)]
    for group, bits in zip(codes.split(GROUP, 1), tier.bits, strict=False):
        values = group.long()
        planes += [((values >> plane & 1) << lanes).sum(1, keepdim=True) for plane in range(bits)]
    return _wrapped(torch.cat(planes, 1))


def _wrapped(words: Tensor) -> Tensor:
    """Whole numbers below 2^32 as int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
