"""embkern: compress the token embeddings of Transformer models and look them up with fused kernels.

``embkern.compress`` does the main job; ``embkern.ops`` has the kernels' public functions,
``embkern.methods`` what turns a table into a ``PackedTable`` or ``Factors``. Importing the package touches no
device, and registers the saved format with transformers as soon as that is imported, in whichever order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from ._version import __version__

if TYPE_CHECKING:
    from .api import compress, count_files, export_dense
    from .models.config import EmbkernConfig
    from .models.report import Report
    from .models.resize import resize_token_embeddings
    from .nn import FactorizedEmbedding, FactorizedHead, PackedEmbedding, PackedHead
    from .recipe import Recipe
    from .tables import Factors, PackedTable
    from .text import TokenCounts, count_tokens, read_texts

# Public names by the module that has them, imported at first use: `import embkern` costs milliseconds.
_PUBLIC = {
    "compress": "api",
    "count_files": "api",
    "export_dense": "api",
    "Factors": "tables",
    "PackedTable": "tables",
    "FactorizedEmbedding": "nn",
    "FactorizedHead": "nn",
    "PackedEmbedding": "nn",
    "PackedHead": "nn",
    "TokenCounts": "text",
    "count_tokens": "text",
    "read_texts": "text",
    "Recipe": "recipe",
    "Report": "models.report",
    "EmbkernConfig": "models.config",
    "resize_token_embeddings": "models.resize",
}

__all__ = [
    "EmbkernConfig",
    "FactorizedEmbedding",
    "FactorizedHead",
    "Factors",
    "PackedEmbedding",
    "PackedHead",
    "PackedTable",
    "Recipe",
    "Report",
    "TokenCounts",
    "__version__",
    "compress",
    "count_files",
    "count_tokens",
    "export_dense",
    "read_texts",
    "resize_token_embeddings",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


# Runs at once if transformers' quantizers are loaded already, else right after they are.
@wrapt.when_imported("transformers.quantizers.auto")
def _register(_: Any) -> None:
    importlib.import_module(".models.quantizer", __name__)
