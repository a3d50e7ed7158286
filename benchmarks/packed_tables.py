"""Packed tables of random codes: the time of a lookup does not depend on the values."""

from __future__ import annotations

from typing import Any

import torch

from embkern.ops.packed_codes import GROUP, LEVEL_BITS, packed_levels
from embkern.ops.packed_format import Tier
from embkern.tables.packed import PackedTable, pack


def random_packed_table(
    V: int,
    H: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, ...] = (8, 4, 2),
    seed: int = 0,
) -> PackedTable:
    """Return V rows in random tiers: one of values per entry of ``bits``, one of K coefficients if K > 0.

    The values have a standard deviation near 1, the rows of coefficients too, and the offset is as large.
    """
    generator = torch.Generator().manual_seed(seed)
    tiers = [Tier(False, (each,) * -(-H // GROUP)) for each in bits]
    if K:
        tiers.append(Tier(True, (bits[0],) * (K // GROUP)))
    tier_of = torch.randint(len(tiers), (V,), generator=generator)
    codes, scales = {}, torch.rand(V, generator=generator) + 0.5
    for index, tier in enumerate(tiers):
        rows = torch.nonzero(tier_of == index).flatten()
        shape = (len(rows), len(tier.bits) * GROUP)
        codes[index] = torch.randint(2 ** tier.bits[0], shape, dtype=torch.uint8, generator=generator)
        if tier.bits[0] > LEVEL_BITS:  # such codes are uniform, in steps of 1
            scales[rows] /= 2 ** tier.bits[0] / 12**0.5
    basis = torch.randn(K, H, generator=generator) / K**0.5 if K else None
    offset = torch.randn(H, generator=generator)
    arguments: list[Any] = [tier_of, codes, tiers, packed_levels()]
    arguments += [None if each is None else each.to(dtype) for each in (scales, basis, offset)]
    return pack(*[*arguments, H])
