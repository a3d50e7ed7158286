"""Models of sentence-transformers: static embeddings, whose table is an ``nn.EmbeddingBag``, and encoders.

A compressed static model is saved in its own format: ``model.safetensors`` has the tensors of the packed
table, ``embedding.records`` and so on, in the place of ``embedding.weight``. ``embkern._registration`` lets
``SentenceTransformer(DIR)`` read it. Without embkern loading fails for want of ``embedding.weight``: the
readers of static embeddings initialise nothing at random, so that these files need no guard.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..io.errors import reason_of
from ..nn import PackedEmbeddingBag
from ..recipe import Recipe
from ..tables import PackedTable, Table
from .find_table import ModelTable, UnsupportedModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

BAG = "0.embedding"  # name of the bag in a static model, whose first module holds it


def is_sentence_transformer(model: Any) -> bool:
    """Return whether a model is a ``SentenceTransformer``, without importing the library."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def is_static(model: Any) -> bool:
    """Return whether a model is a ``SentenceTransformer`` of static embeddings, dense or compressed."""
    if not is_sentence_transformer(model) or not len(model):
        return False
    return isinstance(getattr(model[0], "embedding", None), (nn.EmbeddingBag, PackedEmbeddingBag))


def encoder_of(model: SentenceTransformer) -> Any:
    """Return the model of transformers in a ``SentenceTransformer``.

    Raises:
        UnsupportedModelError: its first module has none.
    """
    encoder = getattr(model[0], "auto_model", None) if len(model) else None
    if encoder is None:
        kind = type(model[0]).__name__ if len(model) else "none"
        raise UnsupportedModelError(
            "model: expected a SentenceTransformer whose first module is a Transformer or a StaticEmbedding, "
            f"got {kind}"
        )
    return encoder


def encode_sentences(model: SentenceTransformer, sentences: list[str]) -> Tensor:
    """Return normalised embeddings (N, H) float32 on the CPU."""
    found: Any = model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)
    return F.normalize(found.detach().cpu().float(), dim=1)


def is_static_folder(path: str | os.PathLike) -> bool:
    """Return whether a directory has static embeddings, of sentence-transformers or of model2vec."""
    modules, config = _json(Path(path) / "modules.json"), _json(Path(path) / "config.json")
    if isinstance(modules, list) and modules and isinstance(modules[0], dict):
        return str(modules[0].get("type", "")).endswith(".StaticEmbedding")
    return isinstance(config, dict) and config.get("model_type") == "model2vec"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def load_static(path: str | os.PathLike) -> SentenceTransformer:
    """Load a directory for which ``is_static_folder`` holds.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: the directory cannot be loaded.
    """
    try:
        import sentence_transformers
    except ImportError:
        raise ImportError(
            f"model: {path} has static embeddings; pip install sentence-transformers to load them"
        ) from None
    try:
        if (Path(path) / "modules.json").is_file():
            return sentence_transformers.SentenceTransformer(os.fspath(path))
        static, normalize = _module_classes()
        modules: list[Any] = [static.load(os.fspath(path))]
        if (_json(Path(path) / "config.json") or {}).get("normalize"):
            modules.append(normalize())
        return sentence_transformers.SentenceTransformer(modules=modules)
    except Exception as error:  # safetensors, tokenizers and torch raise errors of many types
        raise ValueError(f"model: {path} cannot be loaded: {reason_of(error)}") from error


def _module_classes() -> tuple[Any, Any]:
    """Return the classes StaticEmbedding and Normalize."""
    try:
        from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    except ImportError:  # before version 6
        from sentence_transformers.models import Normalize, StaticEmbedding
    return StaticEmbedding, Normalize


def tokenizer_of(model: SentenceTransformer) -> PreTrainedTokenizerBase:
    """Return the tokenizer of static embeddings as one of transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=model[0].tokenizer)


def find_bag(model: SentenceTransformer) -> ModelTable:
    """Return the table of static embeddings.

    Raises:
        UnsupportedModelError: it is compressed already, or renormalises rows.
    """
    bag = model[0].embedding
    if isinstance(bag, PackedEmbeddingBag):
        raise UnsupportedModelError("the model's embedding is compressed already; decode it: embkern export")
    if bag.max_norm is not None:
        raise UnsupportedModelError(
            f"{BAG} renormalises rows on lookup (max_norm), which a compressed table cannot"
        )
    return ModelTable(BAG, [BAG], [], None, {BAG: 1.0}, bag.weight, role="bag")


def check_bag(recipe: Recipe) -> None:
    """Raise ValueError unless a recipe makes packed tables of the one table of static embeddings."""
    if recipe.leaves_rows_out:
        raise ValueError(
            f"unseen: expected 'allocate' for static embeddings, got {recipe.options['unseen']!r}"
        )
    if not recipe.makes_packed_tables:
        raise ValueError(
            f"method: expected one that makes packed tables for static embeddings, got {recipe.method!r}"
        )
    if recipe.tables is not None:
        raise ValueError(f"tables: expected none for static embeddings, got {', '.join(recipe.tables)}")


def install_bag(model: SentenceTransformer, compressed: Table) -> None:
    """Replace the bag of static embeddings by one over a packed table."""
    assert isinstance(compressed, PackedTable), "check_bag lets only such methods pass"
    dense = model[0].embedding
    bag = PackedEmbeddingBag(
        compressed.to(dense.weight.device),
        mode=dense.mode,
        include_last_offset=dense.include_last_offset,
        padding_idx=dense.padding_idx,
        dtype=dense.weight.dtype,
    )
    bag.adjust(None)
    model[0].embedding = bag.train(dense.training)


@torch.no_grad()
def decode_bag(model: SentenceTransformer) -> SentenceTransformer:
    """Replace the bag of compressed static embeddings by a dense one, in place; return the model.

    Raises:
        ValueError: the model is not compressed.
    """
    bag = model[0].embedding
    if not isinstance(bag, PackedEmbeddingBag):
        raise ValueError("model: expected one compressed by embkern, got a dense one")
    model[0].embedding = nn.EmbeddingBag.from_pretrained(
        bag.table.to_dense(),
        freeze=False,
        mode=bag.mode,
        include_last_offset=bag.include_last_offset,
        padding_idx=bag.padding_idx,
    ).train(bag.training)
    return model


def load_packed(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load static embeddings with a packed table as ``cls.load``, ``StaticEmbedding.load``, does dense ones.

    Returns:
        The module, or None if the file has no packed table.

    Raises:
        ValueError: the saved packed table is damaged.
    """
    hub = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
    weights = cls.load_torch_weights(*args, **hub)
    if f"{_PREFIX}records" not in weights:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(cls.load_file_path(*args, filename="tokenizer.json", **hub))
    try:
        bag = PackedEmbeddingBag.from_state(
            {name.removeprefix(_PREFIX): each for name, each in weights.items()}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the saved embedding is damaged: {error}") from None
    static = cls(tokenizer, embedding_dim=1)
    bag.adjust(None)
    static.embedding = bag
    static.num_embeddings, static.embedding_dim = bag.num_embeddings, bag.embedding_dim
    return static


_PREFIX = "embedding."  # of the bag's tensors in the file
_HUB_OPTIONS = ("model_name_or_path", "subfolder", "token", "cache_folder", "revision", "local_files_only")
