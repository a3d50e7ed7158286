"""embkern: compress the token embeddings of Transformer models and look them up with fused kernels.

``embkern.compress`` compresses a model. ``embkern.ops`` has the public functions of the kernels, and
``embkern.methods`` the methods that turn a table into a ``PackedTable`` or ``Factors``. Importing the package
loads no torch and initialises no device. The saved format is registered with transformers when both packages
have been imported, in either order; where embkern is installed, importing torch is enough.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _registration
from ._version import __version__

if TYPE_CHECKING:
    from .api import calibrate_files, compress, count_files, export_dense
    from .converting import convert
    from .export.gguf import export_gguf
    from .export.onnx import export_onnx
    from .methods.calibration import Calibration
    from .models.calibrate import calibrate, self_calibrate
    from .models.config import EmbkernConfig
    from .models.fisher import fisher_weights
    from .models.fisher_file import fisher_files
    from .models.fused_loss import enable_fused_loss
    from .models.lora import enable_lora
    from .models.ngrammer import disable_ngrammer, enable_ngrammer
    from .models.report import Report
    from .models.resize import resize_token_embeddings
    from .models.training import freeze_table, unfreeze_table
    from .models.unseen_rows import restore_rows
    from .nn import (
        FactorizedEmbedding,
        FactorizedHead,
        NGrammer,
        PackedEmbedding,
        PackedEmbeddingBag,
        PackedHead,
        SegmentedEmbedding,
        TableEmbedding,
        TableHead,
    )
    from .recipe import Recipe
    from .restoring import restore
    from .tables import Factors, PackedTable
    from .text import TokenCounts, count_tokens, read_texts

# Public names and their modules, imported at first use, so that `import embkern` takes milliseconds.
_PUBLIC = {
    "calibrate_files": "api",
    "compress": "api",
    "count_files": "api",
    "export_dense": "api",
    "convert": "converting",
    "export_gguf": "export.gguf",
    "export_onnx": "export.onnx",
    "Calibration": "methods.calibration",
    "calibrate": "models.calibrate",
    "self_calibrate": "models.calibrate",
    "Factors": "tables",
    "PackedTable": "tables",
    "FactorizedEmbedding": "nn",
    "FactorizedHead": "nn",
    "NGrammer": "nn",
    "PackedEmbedding": "nn",
    "PackedEmbeddingBag": "nn",
    "PackedHead": "nn",
    "SegmentedEmbedding": "nn",
    "TableEmbedding": "nn",
    "TableHead": "nn",
    "TokenCounts": "text",
    "count_tokens": "text",
    "read_texts": "text",
    "Recipe": "recipe",
    "Report": "models.report",
    "EmbkernConfig": "models.config",
    "fisher_weights": "models.fisher",
    "fisher_files": "models.fisher_file",
    "enable_fused_loss": "models.fused_loss",
    "enable_lora": "models.lora",
    "disable_ngrammer": "models.ngrammer",
    "enable_ngrammer": "models.ngrammer",
    "resize_token_embeddings": "models.resize",
    "restore": "restoring",
    "restore_rows": "models.unseen_rows",
    "freeze_table": "models.training",
    "unfreeze_table": "models.training",
}

__all__ = [
    "Calibration",
    "EmbkernConfig",
    "FactorizedEmbedding",
    "FactorizedHead",
    "Factors",
    "NGrammer",
    "PackedEmbedding",
    "PackedEmbeddingBag",
    "PackedHead",
    "PackedTable",
    "Recipe",
    "Report",
    "SegmentedEmbedding",
    "TableEmbedding",
    "TableHead",
    "TokenCounts",
    "__version__",
    "calibrate",
    "calibrate_files",
    "compress",
    "convert",
    "count_files",
    "count_tokens",
    "disable_ngrammer",
    "enable_fused_loss",
    "enable_lora",
    "enable_ngrammer",
    "export_dense",
    "export_gguf",
    "export_onnx",
    "fisher_files",
    "fisher_weights",
    "freeze_table",
    "read_texts",
    "resize_token_embeddings",
    "restore",
    "restore_rows",
    "self_calibrate",
    "unfreeze_table",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_registration.install()
