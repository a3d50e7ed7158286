"""The packed format: sizes, tiers, directory, records, and the checks of a table.

docs/packed-format.md specifies the format. Beside ``packed_codes``, which this module uses, and
``first_edition``, no other Python module knows how a table is laid out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import first_edition
from .packed_codes import (
    GROUP,
    LEVELS_SHAPE,
    MAX_BITS,
    ShiftRight,
    records_of,
    taken,
    values_of_records,
)

MAX_TIERS = 16
ENTRY_WORDS = 5  # An entry of the directory has the place of its first record and four words of tiers.
_TIERS_PER_WORD = 8
_LARGEST_WORD = 2**32 - 1
# Dtypes in which the ops take the integers; the first one is that of files.
CODE_DTYPES = {
    "records": (torch.int32,),
    "directory": (torch.int32,),
    "tiers": (torch.uint8,),
    "levels": (torch.int8, *first_edition.LEVELS_DTYPES),
}


class PackedTensors(NamedTuple):
    """The tensors of a packed table, in the order of the schema of ``gather_decode``."""

    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    scales: Tensor
    basis: Tensor | None = None
    offset: Tensor | None = None

    def contiguous(self) -> PackedTensors:
        """Return the tensors, those that are not contiguous copied."""
        tensors: list[Any] = [each if each is None else each.contiguous() for each in self]
        return PackedTensors(*tensors)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Return the tensors that exist, by name."""
        return ((name, each) for name, each in zip(self._fields, self, strict=True) if each is not None)


class Tier(NamedTuple):
    """A rate: ``bits[g]`` per value of group g, of the row itself or of its coefficients in the basis."""

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


def described_tiers(tiers: Tensor) -> list[Tier]:
    """Return the tensor of tiers as Python values, without the groups of no bits at the end."""
    return [
        Tier(bool(transform), tuple(bits[: max((i + 1 for i, b in enumerate(bits) if b), default=0)]))
        for transform, *bits in tiers.tolist()
    ]


# ---- sizes and layout --------------------------------------------------------------------------------


def packed_bytes(rows: Tensor, tiers: list[Tier], floats: int, basis_rows: int, embedding_dim: int) -> int:
    """Bytes of a table with ``rows[t]`` rows in tier t and floating-point values of ``floats`` bytes."""
    total = int(rows.sum())
    words = max(1, sum(int(count) * tier.words for count, tier in zip(rows.tolist(), tiers, strict=True)))
    directory = 4 * ENTRY_WORDS * -(-total // GROUP)
    fixed = len(tiers) * (1 + _groups(tiers)) + LEVELS_SHAPE[0] * LEVELS_SHAPE[1]
    return 4 * words + directory + fixed + floats * (total + basis_rows * embedding_dim)


def lay_out(
    tier_of: Tensor, codes: Iterable[tuple[int, Tensor, Tensor]], tiers: list[Tier]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return records, directory and tiers of rows.

    Args:
        tier_of: (V,) int64, the tier of every row.
        codes: parts of the rows: a tier, ids (n,) of some of its rows, and their codes (n, 32 groups) uint8.
        tiers: up to 16.
    """
    directory = directory_of(tier_of, tiers)
    words = words_of_rows(tier_of, tiers)
    starts = words.cumsum(0) - words
    records = torch.zeros(max(1, int(words.sum())), dtype=torch.int32)
    for index, rows, some in codes:
        places = starts[rows].unsqueeze(1) + torch.arange(tiers[index].words)
        records[places.flatten()] = records_of(some, tiers[index].bits).flatten()
    groups = _groups(tiers)
    described = [[int(t.transform), *t.bits, *[0] * (groups - len(t.bits))] for t in tiers]
    return records, directory, torch.tensor(described, dtype=torch.uint8)


def _groups(tiers: list[Tier]) -> int:
    return max([1, *(len(tier.bits) for tier in tiers)])


def words_of_rows(tier_of: Tensor, tiers: list[Tier]) -> Tensor:
    """Words (V,) int64 of the rows' records."""
    return torch.tensor([tier.words for tier in tiers], device=tier_of.device)[tier_of]


def directory_of(tier_of: Tensor, tiers: list[Tier]) -> Tensor:
    """Directory (ceil(V / 32), 5) of the rows' tiers (V,): where 32 records begin, then 4 bits a row."""
    words = words_of_rows(tier_of, tiers)
    starts = (words.cumsum(0) - words)[::GROUP]
    _check_place(int(starts[-1]) if len(starts) else 0)
    nibbles = F.pad(tier_of, (0, -len(tier_of) % GROUP)).view(-1, ENTRY_WORDS - 1, _TIERS_PER_WORD)
    nibbles = nibbles << torch.arange(0, 32, 4)
    return _wrapped(torch.cat([starts.unsqueeze(1), nibbles.sum(2)], 1))


def _check_place(last: int) -> None:
    """Raise ValueError unless the place of the last entry of a directory fits into its word."""
    if last > _LARGEST_WORD:
        raise ValueError(
            f"records: expected at most 2^32 words (16 GiB) before the last 32 rows, got {last}; pack parts "
            "of the rows as tables of their own"
        )


def first_words(directory: Tensor) -> Tensor:
    """Where the records of each entry of a directory begin, int64; the words have no sign."""
    return directory[:, 0].long() & _LARGEST_WORD


def tiers_of_rows(directory: Tensor) -> Tensor:
    """Tiers (32 blocks,) int64 that a directory names; those beyond the last row are 0."""
    return _nibbles(directory[:, 1:]).flatten().long()


def rows_taken(packed: PackedTensors, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Records and directory of the rows ids (n,) int64, in their order, which may repeat."""
    tiers, device = described_tiers(packed.tiers), packed.records.device
    tier_of, ids = tiers_of_rows(packed.directory).cpu(), ids.cpu()
    words = words_of_rows(tier_of, tiers)
    own = words[ids]
    ends = own.cumsum(0)
    moved = (words.cumsum(0) - words)[ids] - (ends - own)  # from the new place of a record to the old one
    places = moved.repeat_interleave(own) + torch.arange(int(own.sum()))
    records = packed.records[places.to(device)] if len(places) else torch.zeros_like(packed.records[:1])
    return records, directory_of(tier_of[ids], tiers).to(device)


def _nibbles(words: Tensor) -> Tensor:
    """The eight tiers (N, 4, 8) in each of some words (N, 4)."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return torch.bitwise_right_shift(words.unsqueeze(2), shifts) & 15


def _wrapped(words: Tensor) -> Tensor:
    """Whole numbers below 2^32 as int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


# ---- values ------------------------------------------------------------------------------------------


def packed_values(
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    shift_right: ShiftRight = torch.bitwise_right_shift,
) -> tuple[Tensor, Tensor]:
    """Whether the rows of ids (N,) are coefficients of the basis (N,), and their values (N, 32 G) in fp32."""
    block, lane = ids // GROUP, ids % GROUP
    entry = taken(directory, block)
    tier_of = _nibbles(entry[:, 1:]).flatten(1).long()  # (N, 32), for the rows of the blocks
    bits = tiers[:, 1:].long()
    sizes = F.pad(bits.sum(1), (0, MAX_TIERS - len(tiers)))
    lanes = torch.arange(GROUP, device=ids.device)
    before = torch.where(lanes < lane.unsqueeze(1), taken(sizes, tier_of), 0).sum(1)
    tier = tier_of.gather(1, lane.unsqueeze(1)).squeeze(1)
    start = first_words(entry) + before
    values_of = values_of_records if levels.dtype == torch.int8 else first_edition.values_of_records
    return taken(tiers[:, 0], tier).bool(), values_of(records, start, tier, bits, levels, shift_right)


# ---- checks ------------------------------------------------------------------------------------------


def check_packed(packed: PackedTensors, embedding_dim: int) -> None:
    """Raise unless the tensors of a packed table have shapes, dtypes and devices that fit each other."""
    records, _, tiers, _, scales, basis, offset = packed
    rows, groups = len(scales) if scales.dim() else 0, tiers.shape[1] - 1 if tiers.dim() == 2 else 0
    expected = {
        "directory": (-(-rows // GROUP), ENTRY_WORDS),
        "levels": first_edition.LEVELS_SHAPE
        if first_edition.is_first_edition(packed.levels)
        else LEVELS_SHAPE,
        "scales": (rows,),
    }
    if rows == 0:
        raise ValueError(f"scales: expected shape (V,) with V >= 1, got {tuple(scales.shape)}")
    for name, tensor in packed.named():
        if name in CODE_DTYPES and tensor.dtype not in CODE_DTYPES[name]:
            expected_dtypes = " or ".join(map(str, CODE_DTYPES[name]))
            raise TypeError(f"{name}: expected dtype {expected_dtypes}, got {tensor.dtype}")
        if name in expected and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: expected shape {expected[name]}, got {tuple(tensor.shape)}")
    if records.dim() != 1 or records.shape[0] == 0:
        raise ValueError(f"records: expected shape (W,) with W >= 1, got {tuple(records.shape)}")
    if tiers.dim() != 2 or not 1 <= tiers.shape[0] <= MAX_TIERS or groups < 1:
        raise ValueError(
            f"tiers: expected shape (T, 1 + G) with T up to {MAX_TIERS} and G >= 1, got {tuple(tiers.shape)}"
        )
    if basis is not None and (basis.dim() != 2 or basis.shape[1] != embedding_dim or basis.shape[0] % GROUP):
        raise ValueError(
            f"basis: expected shape (K, {embedding_dim}) with K a multiple of {GROUP}, "
            f"got {tuple(basis.shape)}"
        )
    if offset is not None and tuple(offset.shape) != (embedding_dim,):
        raise ValueError(f"offset: expected shape ({embedding_dim},), got {tuple(offset.shape)}")
    for name, tensor in packed.named():
        if name in ("basis", "offset") and tensor.dtype != scales.dtype:
            raise TypeError(f"{name}: expected dtype {scales.dtype} as in scales, got {tensor.dtype}")
    for name, tensor in packed.named():
        if tensor.device != scales.device:
            raise ValueError(f"{name}: expected device {scales.device} as in scales, got {tensor.device}")


def check_table(packed: PackedTensors, embedding_dim: int) -> None:
    """Raise unless the tensors are a valid table, values included; values of meta tensors are not read.

    A table is checked once, when it is made from outside or read from a file.
    """
    check_packed(packed, embedding_dim)
    for name, tensor in packed.named():
        if name in CODE_DTYPES and tensor.dtype not in (CODE_DTYPES[name][0], first_edition.LEVELS_DTYPES[0]):
            raise TypeError(f"{name}: expected dtype {CODE_DTYPES[name][0]} in a table, got {tensor.dtype}")
    if not packed.scales.is_floating_point():
        raise TypeError(f"scales: expected a floating-point dtype, got {packed.scales.dtype}")
    # Basis and offset have H columns; without both, only the tiers bound H.
    if type(embedding_dim) is not int or embedding_dim < 1:
        raise ValueError(f"embedding_dim: expected a positive integer, got {embedding_dim!r}")
    if packed.basis is not None and packed.basis.shape[0] == 0:
        raise ValueError(f"basis: expected (K, H) with K of at least {GROUP}, or None, got no rows")
    widest = GROUP * (packed.tiers.shape[1] - 1)
    if packed.basis is None and packed.offset is None and embedding_dim > widest:
        raise ValueError(
            f"embedding_dim: expected at most {widest}, the values that tiers describe, got {embedding_dim}"
        )
    if not packed.scales.is_meta:
        _check_values(packed, embedding_dim)


def _check_values(packed: PackedTensors, embedding_dim: int) -> None:
    """Raise unless the tiers fit row and basis, and the records are those that the directory describes."""
    if int(packed.tiers[:, 1:].max()) > MAX_BITS or int(packed.tiers[:, 0].max()) > 1:
        raise ValueError(f"tiers: expected 0 or 1, then 0 to {MAX_BITS} bits, got {packed.tiers.tolist()}")
    basis_groups = packed.basis.shape[0] // GROUP if packed.basis is not None else 0
    tiers = described_tiers(packed.tiers)
    for tier in tiers:
        most = basis_groups if tier.transform else -(-embedding_dim // GROUP)
        if any(tier.bits[most:]):
            raise ValueError(f"tiers: expected at most {most} groups, got {tier}")
    tier_of = tiers_of_rows(packed.directory)[: len(packed.scales)]
    if int(tier_of.max()) >= len(tiers):
        raise ValueError(f"directory: expected tiers below {len(tiers)}, got {int(tier_of.max())}")
    words = words_of_rows(tier_of, tiers)
    starts = words.cumsum(0) - words
    if not torch.equal(first_words(packed.directory), starts[::GROUP]):
        raise ValueError("directory: the places of the records do not follow from the rows' tiers")
    if (expected := max(1, int(words.sum()))) != len(packed.records):
        raise ValueError(f"records: expected {expected} words, got {len(packed.records)}")
