"""Evaluation of compressed models: perplexity, fine-tuning, and the harnesses of others."""

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
    from .squad import SQUAD

# Public names and their modules, imported at first use so that the command line starts without torch.
_PUBLIC = {
    "GLUE": "glue",
    "SQUAD": "squad",
    "FineTuned": "cells",
    "HarnessRun": "harness",
    "Perplexity": "perplexity",
    "PerplexityReport": "perplexity",
    "evaluate_perplexity": "perplexity",
    "fine_tune": "finetune",
    "measure_perplexity": "against",
    "run_lm_eval": "harness",
    "run_mteb": "harness",
}

__all__ = [
    "GLUE",
    "SQUAD",
    "FineTuned",
    "HarnessRun",
    "Perplexity",
    "PerplexityReport",
    "evaluate_perplexity",
    "fine_tune",
    "measure_perplexity",
    "run_lm_eval",
    "run_mteb",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
