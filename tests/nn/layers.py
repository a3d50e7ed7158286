"""Compressed embeddings of 13 rows of 8, over either kind of table, and their dense equivalents."""

from __future__ import annotations

import torch
from torch import nn

from embkern import FactorizedEmbedding
from embkern.nn.base import CompressedEmbedding
from embkern.nn.packed import PackedEmbedding
from tests.example_tables import packed_of

FACTORS, PACKED = "factors", "packed"


def layer(kind: str = FACTORS, *, offset: bool = True, **kwargs) -> CompressedEmbedding:
    if kind == FACTORS:
        return FactorizedEmbedding(13, 8, 3, offset=offset, **kwargs)
    return PackedEmbedding(packed_of(torch.randn(13, 8), torch.float32, offset), **kwargs)


def dense_of(embedding: CompressedEmbedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(
        embedding.weight.detach().clone(), freeze=False, padding_idx=embedding.padding_idx
    )
