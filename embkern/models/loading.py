"""Load models and tokenizers from a directory or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..io.errors import reason_of
from .config import check_config
from .find_table import input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "spiece*", "merges.txt")


def load_model(name: str | os.PathLike) -> PreTrainedModel:
    """Load a model with its head, in the dtype it is stored in, dense or compressed.

    Raises:
        FileNotFoundError: it is neither a directory nor to be had from the hub.
        ValueError: the directory holds no loadable model (a damaged file, an unknown architecture).
    """
    if not Path(name).exists() and str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"model: expected a directory or a name on the hub, found none at {name}")
    try:
        check_config(name)
        config = AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModel)
        model, info = architecture.from_pretrained(name, output_loading_info=True)
        _check_loaded(model, info["missing_keys"])
        return model
    except Exception as error:  # transformers and safetensors raise many kinds; all mean the same here
        raise not_loaded(name, error) from error


def not_loaded(name: str | os.PathLike, error: Exception) -> Exception:
    """Return what to raise where a library fails to load a model."""
    if Path(name).exists():
        return ValueError(f"model: {name} cannot be loaded: {reason_of(error)}")
    return FileNotFoundError(
        f"model: {str(name)!r} is neither a directory here nor to be had from the hub: {reason_of(error)}"
    )


def _check_loaded(model: PreTrainedModel, missing: set[str]) -> None:
    """Raise if the table, or a head that belongs to it, was not in the checkpoint and is random."""
    interesting = {id(input_embeddings(model)), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in interesting]
    lost = sorted(key for key in missing if key.rpartition(".")[0] in names)
    if lost:
        raise ValueError(f"the checkpoint does not hold {', '.join(lost)}")


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a model; None if there is none.

    Raises:
        ValueError: its files are there and cannot be read.
    """
    if Path(name).is_dir() and not any(next(Path(name).glob(each), None) for each in _TOKENIZER_FILES):
        return None  # transformers would make up one of the model's class
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many kinds, see load_model
        if not Path(name).is_dir():
            return None
        raise ValueError(f"tokenizer: the one in {name} cannot be loaded: {error}") from error
