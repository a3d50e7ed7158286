"""What compression changed: the table row by row, and what the model makes of a text."""

from .sentences import SentenceFidelity, embed_sentences, read_sentences, sentence_fidelity
from .table import TableComparison, compare_tables

__all__ = [
    "SentenceFidelity",
    "TableComparison",
    "compare_tables",
    "embed_sentences",
    "read_sentences",
    "sentence_fidelity",
]
