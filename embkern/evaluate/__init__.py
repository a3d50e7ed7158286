"""What compression changed: the table row by row, and what the model makes of a text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .perplexity import Perplexity, PerplexityReport, TableSwap, evaluate_perplexity, measure_perplexity
    from .sentences import SentenceFidelity, embed_sentences, read_sentences, sentence_fidelity
    from .table import TableComparison, compare_tables

# Public names by the module that has them, imported at first use: the command line starts without torch.
_PUBLIC = {
    "Perplexity": "perplexity",
    "PerplexityReport": "perplexity",
    "SentenceFidelity": "sentences",
    "TableComparison": "table",
    "TableSwap": "perplexity",
    "compare_tables": "table",
    "embed_sentences": "sentences",
    "evaluate_perplexity": "perplexity",
    "measure_perplexity": "perplexity",
    "read_sentences": "sentences",
    "sentence_fidelity": "sentences",
}

__all__ = [
    "Perplexity",
    "PerplexityReport",
    "SentenceFidelity",
    "TableComparison",
    "TableSwap",
    "compare_tables",
    "embed_sentences",
    "evaluate_perplexity",
    "measure_perplexity",
    "read_sentences",
    "sentence_fidelity",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
