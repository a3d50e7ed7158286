"""Lookups in packed tables of random codes, and the same in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from embkern.ops import gather_decode
from embkern.ops.packed_format import Tier
from embkern.tables.packed import TENSORS, pack
from tests.ops.guard_pages import at_the_end


class Problem(NamedTuple):
    """Ids, the other arguments of the op, and the packed values (V, H or K) with their kind."""

    ids: Tensor
    codes: list[Tensor]
    scales: Tensor
    basis: Tensor | None
    offset: Tensor | None
    values: Tensor
    transform: Tensor
    H: int

    @property
    def factors(self) -> list[Tensor]:
        return [each for each in (self.scales, self.basis, self.offset) if each is not None]

    def ours(self, ids: Tensor, *factors: Tensor, **options) -> Tensor:
        given = iter(factors)
        rest = [each if each is None else next(given) for each in (self.scales, self.basis, self.offset)]
        return gather_decode(ids, *self.codes, *rest, embedding_dim=self.H, **options)

    def plain(self, ids: Tensor, *factors: Tensor) -> Tensor:
        scales, *rest = factors
        values = F.embedding(ids, self.values.to(scales.dtype))
        rows = F.pad(values, (0, max(0, self.H - values.shape[-1])))[..., : self.H]
        if self.basis is not None:
            basis = rest.pop(0)
            products = values[..., : len(basis)] @ basis
            rows = torch.where(self.transform[ids].unsqueeze(-1), products, rows)
        rows = scales[ids].unsqueeze(-1) * rows
        return rows + rest.pop() if rest else rows


def every_tier(H: int, K: int) -> list[Tier]:
    """Every width; different widths with an empty group; rows with fewer groups, or none: at most 15."""
    groups, terms = -(-H // 32), K // 32
    tiers = [Tier(False, (bits,) * groups) for bits in range(1, 9)]
    tiers += [
        Tier(False, ((5, 0, 4, 1, 8, 3) * groups)[:groups]),
        Tier(False, ((1, 2, 1, 3) * groups)[:groups]),
    ]
    tiers += [Tier(False, (1,)), Tier(False, ())]
    if terms:
        tiers += [Tier(True, (4, 2, 1)[:terms]), Tier(True, (8,) * terms)]
        tiers += [Tier(True, ((0, 6) * terms)[:terms])]
    return tiers


def random_levels() -> Tensor:
    return torch.randint(-128, 128, (17, 16), dtype=torch.int8)  # whose sums wrap


def random_codes(rows: int, tier: Tier) -> Tensor:
    """Codes (rows, 32 G) uint8."""
    most = torch.tensor([2**bits for bits in tier.bits] or [1]).repeat_interleave(32)[: 32 * len(tier.bits)]
    return (torch.rand(rows, len(most)) * most).to(torch.uint8)


_VALUE = torch.arange(32)  # of a group


def values_of(codes: Tensor, tier: Tier, levels: Tensor) -> Tensor:
    """The values of codes (n, 32 G), all windows of the stream at once."""
    values = torch.zeros(codes.shape, dtype=torch.float64)
    stream, at = (
        [torch.zeros(len(codes), 0, dtype=torch.int64)],
        [],
    )  # at: column, step, bits, half of the group
    for group, bits in enumerate(tier.bits):
        own = codes[:, 32 * group : 32 * group + 32].long()
        if bits > 4:
            values[:, 32 * group : 32 * group + 32] = own - (2**bits - 1) / 2
        elif bits:
            q, j, m = _VALUE // 16, _VALUE // 4 % 4, _VALUE % 4
            step = 4 * m + j if bits == 1 else 16 * q + 4 * m + j
            steps = torch.zeros(len(own), 16 if bits == 1 else 32, dtype=torch.int64)
            steps.index_add_(1, step, own << q if bits == 1 else own & 3)
            begin = sum(each.shape[1] for each in stream)
            at.append(torch.stack([32 * group + _VALUE, begin + step, torch.full_like(q, bits), q]))
            stream.append(steps)
    if not at:
        return values
    ring, (column, step, bits, q) = torch.cat(stream, 1), torch.cat(at, 1)
    w = sum(ring.roll(-k, 1) << 2 * k for k in range(6))[:, step]
    i0, i1, i2 = w >> 4 & 15, (w ^ w >> 8) & 15, (w >> 3 ^ w >> 8) & 15
    e = torch.where(bits == 1, 0, codes[:, column].long() >> 2)
    table, first = levels.long(), torch.tensor([0, 0, 6, 9, 13])[bits] + torch.where(bits == 1, 3 * q, 0)
    level = table[first, i0] + table[first + 1, i1] + table[first + 2 + torch.where(bits == 3, e, 0), i2]
    level += torch.where(bits == 4, table[16, torch.where(bits == 4, e, 0) + (i1 & 12)], 0)
    values[:, column] = ((level + 128) % 256 - 128).double() / 32
    return values


def packed(V, H, tiers, dtype=torch.float32, basis=None, offset=None, device="cpu"):
    """A table of random codes in random tiers, its values, and whether they are coefficients."""
    groups = max(1, *(len(tier.bits) for tier in tiers))
    tier_of, levels = torch.randint(len(tiers), (V,)), random_levels()
    values, codes = torch.zeros(V, groups * 32, dtype=torch.float64), {}
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tier_of == index).flatten()
        codes[index] = random_codes(len(rows), tier)
        values[rows, : 32 * len(tier.bits)] = values_of(codes[index], tier, levels)
    scales = (torch.rand(V) + 0.5).to(dtype)
    table = pack(tier_of, codes, tiers, levels, scales, basis, offset, H)
    transform = torch.tensor([tier.transform for tier in tiers])[tier_of]
    return table.to(device), values.to(device), transform.to(device)


def problem(
    shape, dtype=torch.float32, device="cpu", offset=True, ids_dtype=torch.int64, tiers=None
) -> Problem:
    V, H, K, N = shape
    ids = (torch.rand(N, device=device) ** 3 * V).to(
        ids_dtype
    )  # The draw is skewed, so that many ids repeat.
    basis = (torch.randn(K, H) / max(K, 1) ** 0.5).to(dtype) if K else None
    bias = torch.randn(H).to(dtype) if offset else None
    table, values, transform = packed(V, H, tiers or every_tier(H, K), dtype, basis, bias, device)
    tensors = [getattr(table, name) for name in TENSORS]
    return Problem(ids, tensors[:4], *tensors[4:], values, transform, H)


def small(dtype=torch.float32, device="cpu", **options) -> Problem:
    """A table of 40 rows, few enough values for finite differences."""
    tiers = [Tier(False, (3,)), Tier(False, (6,)), Tier(True, (4,)), Tier(True, (5,))]
    return problem((40, 5, 32, 11), dtype, device, tiers=tiers, **options)


def guarded(p: Problem) -> Problem:
    ids, scales, basis, offset = (
        each if each is None else at_the_end(each) for each in (p.ids, p.scales, p.basis, p.offset)
    )
    return p._replace(
        ids=ids, codes=list(map(at_the_end, p.codes)), scales=scales, basis=basis, offset=offset
    )
