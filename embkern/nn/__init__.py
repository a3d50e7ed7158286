"""Replacements of ``nn.Embedding`` and of a tied ``nn.Linear`` that decode a compressed table."""

from ..tables import Table
from .bag import PackedEmbeddingBag
from .base import CompressedEmbedding, CompressedHead
from .factorized import FactorizedEmbedding, FactorizedHead
from .packed import PackedEmbedding, PackedHead
from .segmented import SegmentedEmbedding

KINDS: dict[str, type[CompressedEmbedding]] = {
    layer.kind: layer for layer in (FactorizedEmbedding, PackedEmbedding)
}


def layer_of(table: Table) -> type[CompressedEmbedding]:
    """Return the embedding class for the type of ``table``."""
    return next(layer for layer in KINDS.values() if isinstance(table, layer.table_type))


__all__ = [
    "KINDS",
    "CompressedEmbedding",
    "CompressedHead",
    "FactorizedEmbedding",
    "FactorizedHead",
    "PackedEmbedding",
    "PackedEmbeddingBag",
    "PackedHead",
    "SegmentedEmbedding",
    "layer_of",
]
