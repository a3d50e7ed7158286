"""Replacements of ``nn.Embedding`` and of a tied ``nn.Linear`` that decode a compressed table."""

from .bag import PackedEmbeddingBag
from .base import CompressedEmbedding, CompressedHead
from .factorized import FactorizedEmbedding, FactorizedHead
from .kinds import KINDS, Kind, kind_of, layer_of
from .ngrammer import NGrammer
from .packed import PackedEmbedding, PackedHead
from .rows import TableEmbedding, TableHead
from .segmented import SegmentedEmbedding

__all__ = [
    "KINDS",
    "CompressedEmbedding",
    "CompressedHead",
    "FactorizedEmbedding",
    "FactorizedHead",
    "Kind",
    "NGrammer",
    "PackedEmbedding",
    "PackedEmbeddingBag",
    "PackedHead",
    "SegmentedEmbedding",
    "TableEmbedding",
    "TableHead",
    "kind_of",
    "layer_of",
]
