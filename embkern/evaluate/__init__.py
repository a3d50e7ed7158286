"""What compression changed: the table row by row, and what the model makes of a text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .finetune import FineTuned, fine_tune
    from .glue import GLUE
    from .harness import HarnessRun, run_lm_eval, run_mteb
    from .perplexity import Perplexity, PerplexityReport, TableSwap, evaluate_perplexity, measure_perplexity
    from .sentences import SentenceFidelity, embed_sentences, read_sentences, sentence_fidelity
    from .squad import SQUAD
    from .table import TableComparison, compare_tables

# Public names by the module that has them, imported at first use: the command line starts without torch.
_PUBLIC = {
    "GLUE": "glue",
    "SQUAD": "squad",
    "FineTuned": "finetune",
    "HarnessRun": "harness",
    "Perplexity": "perplexity",
    "PerplexityReport": "perplexity",
    "SentenceFidelity": "sentences",
    "TableComparison": "table",
    "TableSwap": "perplexity",
    "compare_tables": "table",
    "embed_sentences": "sentences",
    "evaluate_perplexity": "perplexity",
    "fine_tune": "finetune",
    "measure_perplexity": "perplexity",
    "read_sentences": "sentences",
    "run_lm_eval": "harness",
    "run_mteb": "harness",
    "sentence_fidelity": "sentences",
}

__all__ = [
    "GLUE",
    "SQUAD",
    "FineTuned",
    "HarnessRun",
    "Perplexity",
    "PerplexityReport",
    "SentenceFidelity",
    "TableComparison",
    "TableSwap",
    "compare_tables",
    "embed_sentences",
    "evaluate_perplexity",
    "fine_tune",
    "measure_perplexity",
    "read_sentences",
    "run_lm_eval",
    "run_mteb",
    "sentence_fidelity",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
