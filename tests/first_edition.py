"""Packed tables of the first edition of the format, of random codes, and models that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from embkern import Recipe
from embkern.models.quantizer import install
from embkern.models.select_tables import find_tables
from embkern.ops.packed_format import Tier, directory_of, words_of_rows
from embkern.tables.packed import PackedTable

LEVELS = Path(__file__).parent / "data" / "packed-1.safetensors"


def first_edition(
    num_embeddings: int,
    embedding_dim: int,
    tiers: list[Tier],
    *,
    basis: bool = False,
    offset: bool = False,
    dtype: torch.dtype = torch.float16,
) -> PackedTable:
    """Return a table of random codes whose rows have the tiers in turn, drawn with torch's generator."""
    tier_of, groups = torch.arange(num_embeddings) % len(tiers), max(len(tier.bits) for tier in tiers)
    described = [[int(tier.transform), *tier.bits, *[0] * (groups - len(tier.bits))] for tier in tiers]
    words = max(1, int(words_of_rows(tier_of, tiers).sum()))
    size = 32 * max((len(tier.bits) for tier in tiers if tier.transform), default=0)
    decay = torch.logspace(0, -1, size).unsqueeze(1)
    return PackedTable(
        torch.randint(-(2**31), 2**31, (words,)).to(torch.int32),
        directory_of(tier_of, tiers),
        torch.tensor(described, dtype=torch.uint8),
        PackedTable.load(LEVELS).levels,
        (0.5 + torch.rand(num_embeddings)).to(dtype),
        (decay * torch.randn(size, embedding_dim)).to(dtype) if basis else None,
        torch.randn(embedding_dim).to(dtype) if offset else None,
        embedding_dim,
    )


def of_model(
    model: Any, tiers: list[Tier] | None = None, *, names: tuple[str, ...] = ("input",)
) -> dict[str, PackedTable]:
    """Replace tables of a model by those of the first edition, and return them by module."""
    made = {}
    recipe = Recipe.parse(method="allocate", ratio=4.0, tables=None if names == ("input",) else list(names))
    for found, _ in find_tables(model, dict.fromkeys(names)):
        V, H = found.rows.shape
        groups = -(-H // 32)
        own = tiers or [Tier(False, (bits,) * groups) for bits in (8, 4, 2)]
        made[found.root] = first_edition(V, H, own)
        install(model, found, made[found.root], recipe)
    return made
