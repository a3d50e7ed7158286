"""Measures of how compression changes a table and sentence embeddings."""

from .divergence import Divergence, HeldOutDivergence
from .sentences import SentenceFidelity, embed_sentences, pooling_of, read_sentences, sentence_fidelity
from .table import TableComparison, WorstRow, compare_tables

__all__ = [
    "Divergence",
    "HeldOutDivergence",
    "SentenceFidelity",
    "TableComparison",
    "WorstRow",
    "compare_tables",
    "embed_sentences",
    "pooling_of",
    "read_sentences",
    "sentence_fidelity",
]
