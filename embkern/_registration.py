"""Registers the saved formats with the libraries that read them, without importing those, torch or embkern.

``install`` runs when embkern is imported, and by the entry point ``torch.backends`` when torch is: a
compressed model then loads although nobody wrote ``import embkern``. It only watches for the import of
transformers' quantizers and base class, of sentence-transformers' static embeddings and of PEFT's wrappers
that train rows or copies of modules, and must never raise, as ``import torch`` would.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANT_METHOD = "embkern"


def install() -> None:
    """Register the formats now with the libraries that are imported, and with the others once they are."""
    pending = {name for name in _READERS if not _registered(name)}
    for name in pending:
        if type(module := sys.modules.get(name)) is ModuleType:
            module.__class__ = _Incomplete
    if pending and not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(pending))


def _registered(name: str) -> bool:
    """Register the format that a module reads if it is imported completely; return whether it is."""
    module = sys.modules.get(name)
    return module is not None and _READERS[name](module)


def _add_quantizer(module: ModuleType) -> bool:
    """Add embkern to the quantizers of transformers; return whether their module was complete."""
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


def _read_packed_bags(module: ModuleType) -> bool:
    """Let static embeddings load packed tables; return whether their module was complete."""
    static: Any = getattr(module, "StaticEmbedding", None)
    dense = getattr(static, "__dict__", {}).get("load")
    if dense is None:
        return False
    if not isinstance(dense, _Load):
        static.load = _Load(dense)
    return True


class _Load(classmethod):
    """``StaticEmbedding.load``, which reads packed tables as well."""

    def __init__(self, dense: Any) -> None:
        @functools.wraps(dense.__func__)
        def load(cls: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return dense.__get__(None, cls)(*args, **kwargs)
            except KeyError:  # the file has no dense table
                embeddings = importlib.import_module(".models.static_embeddings", __package__)
                packed = embeddings.load_packed(cls, args, kwargs)
                if packed is None:
                    raise
                return packed

        super().__init__(load)


def _extend_models(module: ModuleType) -> bool:
    """Let models be made from configs of compressed ones, and resized; return whether they were complete."""
    base: Any = getattr(module, "PreTrainedModel", None)
    methods = getattr(base, "__dict__", {})
    make, resize = methods.get("_from_config"), methods.get("resize_token_embeddings")
    if make is None or resize is None:
        return False
    if not isinstance(make, _FromConfig):
        base._from_config = _FromConfig(make)
        base.resize_token_embeddings = _resizing(resize)
    return True


def _resizing(dense: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``resize_token_embeddings`` of models, which resizes compressed tables as well."""

    @functools.wraps(dense)
    def resize_token_embeddings(
        self: Any, new_num_tokens: Any = None, pad_to_multiple_of: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = getattr(getattr(self, "hf_quantizer", None), "quantization_config", None)
        if getattr(config, "quant_method", None) != QUANT_METHOD:
            return dense(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        resize = importlib.import_module(".models.resize", __package__).resize_token_embeddings
        return resize(self, new_num_tokens, pad_to_multiple_of=pad_to_multiple_of)

    return resize_token_embeddings


class _FromConfig(classmethod):
    """``PreTrainedModel._from_config``, which makes compressed modules on meta for accelerate to load."""

    def __init__(self, make: Any) -> None:
        @functools.wraps(make.__func__)
        def from_config(cls: type, *args: Any, **kwargs: Any) -> Any:
            model = make.__get__(None, cls)(*args, **kwargs)
            described = getattr(model.config, "quantization_config", None)
            if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
                importlib.import_module(".models.skeleton", __package__).compress_skeleton(model, described)
            return model

        super().__init__(from_config)


def _train_tokens(module: ModuleType) -> bool:
    """Let PEFT train rows of compressed tables; return whether its module was complete."""
    layer: Any = getattr(module, "TrainableTokensLayer", None)
    dense = getattr(layer, "__dict__", {}).get("forward_adapters")
    if dense is None:
        return False
    if not hasattr(dense, _EXTENDED):

        @functools.wraps(dense)
        def forward_adapters(self: Any, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
            if not active_adapters or self.disable_adapters or self.merged or not _is_table(self.base_layer):
                return dense(self, x, active_adapters, *args, **kwargs)
            self._check_overlapping_tokens(active_adapters)
            tokens = importlib.import_module(".models.trainable_tokens", __package__)
            return tokens.with_trained_rows(self, x, active_adapters)

        setattr(forward_adapters, _EXTENDED, True)
        layer.forward_adapters = forward_adapters
    return True


def _refuse_copies(module: ModuleType) -> bool:
    """Let PEFT refuse to train a copy of a compressed table; return whether its module was complete."""
    wrapper: Any = getattr(module, "ModulesToSaveWrapper", None)
    dense = getattr(wrapper, "__dict__", {}).get("__init__")
    if dense is None:
        return False
    if not hasattr(dense, _EXTENDED):

        @functools.wraps(dense)
        def init(self: Any, module_to_save: Any, *args: Any, **kwargs: Any) -> None:
            if _is_table(module_to_save):
                importlib.import_module(".models.trainable_tokens", __package__).refuse_copy(module_to_save)
            dense(self, module_to_save, *args, **kwargs)

        setattr(init, _EXTENDED, True)
        wrapper.__init__ = init
    return True


def _is_table(module: Any) -> bool:
    """Return whether a module is compressed, which none is before embkern's are imported."""
    tables = sys.modules.get(f"{__package__}.nn.table_module")
    return tables is not None and isinstance(module, tables.TableModule)


_EXTENDED = "_embkern"  # marks functions of other libraries that have been extended

# By the module that reads it, what registers a format and returns whether the module was complete.
_READERS: dict[str, Callable[[ModuleType], bool]] = {
    "transformers.quantizers.auto": _add_quantizer,
    "transformers.modeling_utils": _extend_models,
    "sentence_transformers.sentence_transformer.modules.static_embedding": _read_packed_bags,
    "sentence_transformers.models.StaticEmbedding": _read_packed_bags,  # before version 5.4
    "peft.tuners.trainable_tokens.layer": _train_tokens,
    "peft.utils.other": _refuse_copies,
}


class _Incomplete(ModuleType):
    """A module that was incomplete at ``install``, as it imports torch; it registers its format when read."""

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute; if the module is complete, its format is registered before."""
        self.__class__ = ModuleType  # type: ignore[assignment]
        if not _registered(ModuleType.__getattribute__(self, "__name__")):
            self.__class__ = _Incomplete
        return ModuleType.__getattribute__(self, name)


class _Watch(MetaPathFinder):
    """Finds no module; registers a format right after the import of the module that reads it."""

    def __init__(self, pending: set[str]) -> None:
        self.pending = pending

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Modules that imported torch themselves were incomplete at ``install``.
        self.pending -= {each for each in self.pending if _registered(each)}
        if name not in self.pending:
            return None
        for finder in sys.meta_path:
            found = None if finder is self else getattr(finder, "find_spec", None)
            spec = found and found(name, path, target)
            if spec is not None:
                _register_after(spec.loader)
                return spec
        return None


def _register_after(loader: Any) -> None:
    """Let the loader of a module in ``_READERS`` register the format after it has run the module."""
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        loader.exec_module = run
        if module.__name__ in _READERS:
            _registered(module.__name__)

    loader.exec_module = exec_module
