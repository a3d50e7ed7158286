"""Load models and tokenizers from a directory or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..io.errors import reason_of
from .body_config import is_compressed
from .config import check_config
from .find_table import input_or_none, output_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "spiece*", "merges.txt")


def load_model(name: str | os.PathLike) -> PreTrainedModel:
    """Load a dense or compressed model with its head, in the dtype in which it is stored.

    Args:
        name: a directory, or a name on the hub.

    Raises:
        FileNotFoundError: it is neither a directory nor a model that the hub provides.
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
    except Exception as error:  # transformers and safetensors raise errors of many types
        raise not_loaded(name, error) from error


def not_loaded(name: str | os.PathLike, error: Exception) -> Exception:
    """Return the exception to raise where a library failed to load the model ``name`` with ``error``."""
    if Path(name).exists():
        return ValueError(f"model: {name} cannot be loaded: {reason_of(error)}")
    return FileNotFoundError(
        f"model: {str(name)!r} is neither a local directory nor a model that the hub provides: "
        f"{reason_of(error)}"
    )


def _check_loaded(model: PreTrainedModel, missing: set[str]) -> None:
    """Raise ValueError if the table or the output head is missing in the checkpoint, and so is random."""
    required = {id(input_or_none(model)), id(output_or_none(model))}
    names = [name for name, module in model.named_modules() if id(module) in required]
    lost = sorted(key for key in missing if key.rpartition(".")[0] in names)
    if lost:
        raise ValueError(f"the checkpoint does not hold {', '.join(lost)}")


def load_compressed(name: str | os.PathLike) -> PreTrainedModel:
    """Load a compressed model as ``load_model`` does; raise ValueError for a dense one."""
    model = load_model(name)
    if not is_compressed(model):
        raise ValueError(f"model: expected one compressed by embkern, got a dense one: {name}")
    return model


def required_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model as ``load_tokenizer`` does; raise FileNotFoundError if there is none."""
    tokenizer = load_tokenizer(name)
    if tokenizer is None:
        raise FileNotFoundError(
            f"tokenizer: expected a directory with one, or a name on the hub, found none at {name}"
        )
    return tokenizer


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model; return None if there is none.

    Args:
        name: a directory, or a name on the hub.

    Raises:
        ValueError: the directory has files of a tokenizer that cannot be loaded.
    """
    if Path(name).is_dir() and not any(next(Path(name).glob(each), None) for each in _TOKENIZER_FILES):
        return None  # transformers would return an empty tokenizer of the model's class
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # errors of many types, as above
        if not Path(name).is_dir():
            return None
        raise ValueError(f"tokenizer: the one in {name} cannot be loaded: {error}") from error
