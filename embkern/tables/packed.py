"""PackedTable: a table whose rows are quantised at different bit rates, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.tensor_format import TensorFormat
from ..ops.gather_decode import check_packed, gather_decode
from ..ops.reference import GROUP, LEVEL_BITS, STATES
from .factors import check_floating

TENSORS = ("records", "directory", "tiers", "levels", "scales", "basis", "offset")
FORMAT = TensorFormat(
    "embkern.packed/1",
    "a packed table",
    required=TENSORS[:5],
    optional=TENSORS[5:],
    settings=("embedding_dim",),
    checked=("embedding_dim",),  # without basis and offset, no tensor has H columns
)
MAX_TIERS, MAX_BITS = 16, 8
_DECODED_ROWS = 8192  # rows that to_dense decodes at a time


class Tier(NamedTuple):
    """One rate: ``bits[g]`` for each of the 32 values of group g.

    The values are the row's own or, with ``transform``, its coefficients in the basis.
    """

    transform: bool
    bits: tuple[int, ...]

    @property
    def words(self) -> int:
        """32-bit words of a record."""
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

    ``row[i] = scales[i] * v + offset`` where v is the values that record i decodes to, or ``values @ basis``
    if the tier holds coefficients.

    Records are stored in the order of the ids. The directory has 4 bits per row for its tier, which
    determines the length of the record, and one word per 32 rows for the start of the first of their records.
    A record consists of bit planes of groups of 32 values: bit i of a group's word p is bit p of the code of
    value i. A code of up to 4 bits selects a level by the state of a trellis, which consists of the code and
    the codes before it in the group (``embkern.ops.reference.trellis_states``).

    Attributes:
        records, directory, tiers, levels: the codes and their layout, as ``embkern.ops.gather_decode`` takes
            them; integers, which no cast of a model changes.
        scales: (V,).
        basis: (K, H) or None.
        offset: (H,) or None.
        embedding_dim: H.
        facts: what the method reports about the result (JSON values); not saved.
        check: whether to call ``validate``; False is for tensors of a table that passed it. Memory safety
            does not depend on it: the kernels check every access.

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
        """Bound H by the tensors, so that no file makes a caller allocate more than the file holds.

        Basis and offset have H columns; without both, the tiers describe at least H values.
        """
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
        """Check the bits of the tiers, the tiers of the rows, and the places and number of the records."""
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
            raise ValueError("directory: the starts of the records do not follow from the rows' tiers")
        if (expected := max(1, int(words.sum()))) != len(self.records):
            raise ValueError(f"records: expected {expected} words, got {len(self.records)}")

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

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def described_tiers(self) -> list[Tier]:
        """Return the tiers as Python values, without trailing groups of 0 bits."""
        return [
            Tier(bool(transform), tuple(bits[: max((i + 1 for i, b in enumerate(bits) if b), default=0)]))
            for transform, *bits in self.tiers.tolist()
        ]

    def tier_of_rows(self) -> Tensor:
        """Return the tier of every row, (V,) int64."""
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
        FORMAT.save(path, self.tensors(), embedding_dim=self.embedding_dim)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedTable:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of a packed table.
        """
        return FORMAT.load(path, lambda tensors, settings: cls(**tensors, **settings))


def packed_bytes(rows: Tensor, tiers: list[Tier], floats: int, basis_rows: int, embedding_dim: int) -> int:
    """Return ``PackedTable.nbytes`` of a table before it is packed.

    Args:
        rows: (T,), the number of rows in each tier.
        tiers: T tiers.
        floats: bytes of a floating-point value.
        basis_rows: K, 0 without a basis. The table has no offset.
        embedding_dim: H.
    """
    counts: list[int] = rows.tolist()
    V = sum(counts)
    words = max(1, sum(count * tier.words for count, tier in zip(counts, tiers, strict=True)))
    groups = max([1, *(len(tier.bits) for tier in tiers)])
    fixed: int = len(tiers) * (1 + groups) + LEVEL_BITS * STATES * 2
    return 4 * words + 20 * -(-V // GROUP) + fixed + floats * (V + basis_rows * embedding_dim)


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
    """Return the packed table of codes.

    Args:
        tier_of: (V,) int64, the tier of every row.
        codes: by tier, the codes (n, 32 G) uint8 of its n rows in the order of their ids; tiers without rows
            or bits may be missing.
        tiers: up to 16.
        levels: (4, 128) int16, as ``embkern.ops.gather_decode`` takes them.
        scales: (V,), floating-point.
        basis: (K, H) in the dtype of scales, or None.
        offset: (H,) in the dtype of scales, or None.
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
    """Return the 32-bit words of every row's record, (V,) int64."""
    return torch.tensor([tier.words for tier in tiers], device=tier_of.device)[tier_of]


def directory_of(tier_of: Tensor, tiers: list[Tier]) -> Tensor:
    """Return the directory (ceil(V / 32), 5) int32 of tiers (V,): a start and 4 bits for each of 32 rows."""
    words = words_of_rows(tier_of, tiers)
    starts = (words.cumsum(0) - words)[::GROUP]
    nibbles = F.pad(tier_of, (0, -len(tier_of) % GROUP)).view(-1, 4, 8) << torch.arange(0, 32, 4)
    return _wrapped(torch.cat([starts.unsqueeze(1), nibbles.sum(2)], 1))


def tiers_of_rows(directory: Tensor) -> Tensor:
    """Return the tiers that a directory (B, 5) has, (32 B,) int64; those beyond the last row are 0."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=directory.device)
    return ((directory[:, 1:, None] >> shifts) & 15).flatten().long()


def bit_planes(codes: Tensor, tier: Tier) -> Tensor:
    """Return the records (n, W) int32 of codes (n, 32 G): bit i of a group's word p is bit p of code i."""
    lanes, planes = torch.arange(GROUP), [torch.zeros(len(codes), 0, dtype=torch.int64)]
    for group, bits in zip(codes.split(GROUP, 1), tier.bits, strict=False):
        values = group.long()
        planes += [((values >> plane & 1) << lanes).sum(1, keepdim=True) for plane in range(bits)]
    return _wrapped(torch.cat(planes, 1))


def _wrapped(words: Tensor) -> Tensor:
    """Return integers below 2^32 as int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
