"""embkern: compress the token embeddings of Transformer models and look them up with fused kernels.

``embkern.compress`` compresses a model. ``embkern.ops`` has the public functions of the kernels, and
``embkern.methods`` the methods that turn a table into a ``PackedTable`` or ``Factors``. Importing the package
loads no torch and initialises no device. The saved format is registered with transformers when both packages
have been imported, in either order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from ._version import __version__

if TYPE_CHECKING:
    from .api import calibrate_files, compress, count_files, export_dense
    from .export.gguf import export_gguf
    from .export.onnx import export_onnx
    from .methods.calibration import Calibration
    from .models.calibrate import calibrate, self_calibrate
    from .models.config import EmbkernConfig
    from .models.fused_loss import enable_fused_loss
    from .models.report import Report
    from .models.resize import resize_token_embeddings
    from .nn import FactorizedEmbedding, FactorizedHead, PackedEmbedding, PackedHead
    from .recipe import Recipe
    from .tables import Factors, PackedTable
    from .text import TokenCounts, count_tokens, read_texts

# Public names and their modules, imported at first use, so that `import embkern` takes milliseconds.
_PUBLIC = {
    "calibrate_files": "api",
    "compress": "api",
    "count_files": "api",
    "export_dense": "api",
    "export_gguf": "export.gguf",
    "export_onnx": "export.onnx",
    "Calibration": "methods.calibration",
    "calibrate": "models.calibrate",
    "self_calibrate": "models.calibrate",
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
    "enable_fused_loss": "models.fused_loss",
    "resize_token_embeddings": "models.resize",
}

__all__ = [
    "Calibration",
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
    "calibrate",
    "calibrate_files",
    "compress",
    "count_files",
    "count_tokens",
    "enable_fused_loss",
    "export_dense",
    "export_gguf",
    "export_onnx",
    "read_texts",
    "resize_token_embeddings",
    "self_calibrate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


# Runs at once if transformers' quantizers are already imported, else right after their import.
@wrapt.when_imported("transformers.quantizers.auto")
def _register(_: Any) -> None:
    importlib.import_module(".models.quantizer", __name__)


# The same for models that accelerate loads into what a config describes.
@wrapt.when_imported("transformers.modeling_utils")
def _extend(modeling: Any) -> None:
    importlib.import_module(".models.skeleton", __name__).extend_from_config(modeling)
