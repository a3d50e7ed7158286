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
    """Every width; different widths with an empty group; rows with fewer groups, or none."""
    groups, terms = -(-H // 32), K // 32
    tiers = [Tier(False, (bits,) * groups) for bits in range(1, 9)]
    tiers += [Tier(False, ((5, 0, 4, 1, 8, 3) * groups)[:groups]), Tier(False, (3,)), Tier(False, ())]
    if terms:
        tiers += [Tier(True, (4, 2, 1)[:terms]), Tier(True, (1,)), Tier(True, (8,) * terms)]
        tiers += [Tier(True, ((0, 6) * terms)[:terms])]
    return tiers


def window(code, bits):
    """States of codes (n, 32): a code and those before it, 7 bits together; the group is a ring."""
    seen, lanes = torch.zeros_like(code), torch.arange(32)
    for before, shift in enumerate(range(0, 7, bits)):
        seen += code[:, (lanes - before) % 32] * 2**shift
    return seen % 128


def packed(V, H, tiers, dtype=torch.float32, basis=None, offset=None, device="cpu"):
    """A table of random codes in random tiers, its values, and whether they are coefficients."""
    groups = max(1, *(len(tier.bits) for tier in tiers))
    tier_of, levels = torch.randint(len(tiers), (V,)), (torch.randn(4, 128) * 3000).to(torch.int16)
    values, codes = torch.zeros(V, groups * 32, dtype=torch.float64), {}
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tier_of == index).flatten()
        codes[index] = torch.zeros(len(rows), len(tier.bits) * 32, dtype=torch.uint8)
        for group, bits in enumerate(tier.bits):
            columns = slice(group * 32, group * 32 + 32)
            code = torch.randint(2**bits, (len(rows), 32))
            codes[index][:, columns] = code.to(torch.uint8)
            uniform = code - (2**bits - 1) / 2
            own = levels[min(bits, 4) - 1, window(code, max(bits, 1))] / 4096
            values[rows, columns] = (uniform if bits > 4 else own if bits else 0 * uniform).double()
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
