"""Evaluation of compressed models: tables, sentence embeddings, perplexity, fine-tuning and harnesses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .against import measure_perplexity
    from .cells import FineTuned
    from .finetune import fine_tune
    from .glue import GLUE
    from .harness import HarnessRun, run_lm_eval, run_mteb
    from .perplexity import Perplexity, PerplexityReport, evaluate_perplexity
    from .sentences import SentenceFidelity, embed_sentences, read_sentences, sentence_fidelity
    from .squad import SQUAD
    from .table import TableComparison, compare_tables
    from .table_swap import TableSwap

# Public names and their modules, imported at first use so that the command line starts without torch.
_PUBLIC = {
    "GLUE": "glue",
    "SQUAD": "squad",
    "FineTuned": "cells",
    "HarnessRun": "harness",
    "Perplexity": "perplexity",
    "PerplexityReport": "perplexity",
    "SentenceFidelity": "sentences",
    "TableComparison": "table",
    "TableSwap": "table_swap",
    "compare_tables": "table",
    "embed_sentences": "sentences",
    "evaluate_perplexity": "perplexity",
    "fine_tune": "finetune",
    "measure_perplexity": "against",
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
