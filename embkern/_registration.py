"""Registers the saved format with transformers, without importing transformers, torch or the rest of embkern.

``install`` runs when embkern is imported, and by the entry point ``torch.backends`` when torch is: a
compressed model then loads although nobody wrote ``import embkern``. It only watches for the import of
transformers' quantizers, and must never raise, as ``import torch`` would.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"
QUANT_METHOD = "embkern"


def install() -> None:
    """Register the format now if transformers' quantizers are imported, else once they are."""
    if not _register() and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register() -> bool:
    """Register the format if transformers' quantizers are imported completely; return whether they are."""
    module = sys.modules.get(QUANTIZERS)
    configs = getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    quantizers = getattr(module, "AUTO_QUANTIZER_MAPPING", None)
    if configs is None or quantizers is None:
        return False
    # Not by transformers' decorators, which would need the classes: their modules take 0.3 s to import.
    configs.setdefault(QUANT_METHOD, _ImportedAtUse("EmbkernConfig"))
    quantizers.setdefault(QUANT_METHOD, _ImportedAtUse("EmbkernQuantizer"))
    return True


class _ImportedAtUse:
    """Stands for a class of ``embkern.models.quantizer`` in transformers' registers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._imported()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # such as from_dict
        return getattr(self._imported(), name)

    def _imported(self) -> Any:
        return getattr(importlib.import_module(".models.quantizer", __package__), self.name)


class _Watch(MetaPathFinder):
    """Finds no module; registers the format right after the import of transformers' quantizers."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # If torch was imported first by the quantizers themselves, they were incomplete at ``install``.
        if _register():
            self._remove()
        if name != QUANTIZERS:
            return None
        self._remove()
        for finder in sys.meta_path:
            found = getattr(finder, "find_spec", None)
            spec = found and found(name, path, target)
            if spec is not None:
                _register_after(spec.loader)
                return spec
        return None

    def _remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _register_after(loader: Any) -> None:
    """Let a loader of transformers' quantizers register the format after it has run them."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        if module.__name__ == QUANTIZERS:
            loader.exec_module = run
            _register()

    loader.exec_module = exec_module
