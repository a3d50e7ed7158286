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
    from .api import compress, export_dense
    from .factors import Factors
    from .layer import FactorizedEmbedding, FactorizedHead, PackedEmbedding, PackedHead
    from .packed import PackedTable
    from .recipe import Recipe
    from .report import Report
    from .transformers import EmbkernConfig, resize_token_embeddings

# Public names by the module that has them, imported at first use: `import embkern` costs milliseconds.
_PUBLIC = {
    "compress": "api",
    "export_dense": "api",
    "Factors": "factors",
    "FactorizedEmbedding": "layer",
    "FactorizedHead": "layer",
    "PackedEmbedding": "layer",
    "PackedHead": "layer",
    "PackedTable": "packed",
    "Recipe": "recipe",
    "Report": "report",
    "EmbkernConfig": "transformers",
    "resize_token_embeddings": "transformers",
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
    "__version__",
    "compress",
    "export_dense",
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
    importlib.import_module(".transformers", __name__)
