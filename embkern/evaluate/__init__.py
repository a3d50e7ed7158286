"""What compression changed: the table row by row, and what the model makes of a text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sentences import SentenceFidelity, embed_sentences, read_sentences, sentence_fidelity
    from .table import TableComparison, compare_tables

# Public names by the module that has them, imported at first use: the command line starts without torch.
_PUBLIC = {
    "SentenceFidelity": "sentences",
    "TableComparison": "table",
    "compare_tables": "table",
    "embed_sentences": "sentences",
    "read_sentences": "sentences",
    "sentence_fidelity": "sentences",
}

__all__ = [
    "SentenceFidelity",
    "TableComparison",
    "compare_tables",
    "embed_sentences",
    "read_sentences",
    "sentence_fidelity",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
