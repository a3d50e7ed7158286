"""What compression costs a model: perplexity, scores after fine-tuning, and the harnesses of others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .finetune import FineTuned, fine_tune
    from .glue import GLUE
    from .harness import HarnessRun, run_lm_eval, run_mteb
    from .perplexity import Perplexity, PerplexityReport, TableSwap, evaluate_perplexity, measure_perplexity
    from .squad import SQUAD

# Public names by the module that has them, imported at first use: the command line starts without torch.
_PUBLIC = {
    "GLUE": "glue",
    "SQUAD": "squad",
    "FineTuned": "finetune",
    "HarnessRun": "harness",
    "Perplexity": "perplexity",
    "PerplexityReport": "perplexity",
    "TableSwap": "perplexity",
    "evaluate_perplexity": "perplexity",
    "fine_tune": "finetune",
    "measure_perplexity": "perplexity",
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
    "TableSwap",
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
