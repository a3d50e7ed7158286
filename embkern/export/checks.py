"""What the exports to one file check and load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.atomic import check_writable
from ..models.body_config import is_compressed
from ..models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_file(output: str | os.PathLike, overwrite: bool) -> None:
    """Raise unless a file may be written at ``output``; for use before the work whose result it will hold."""
    check_writable(output, "output")
    if Path(output).exists() and not overwrite:
        raise FileExistsError(
            f"output: {output} exists; choose another name, or pass overwrite (--overwrite)"
        )


def load_compressed(directory: str | os.PathLike) -> PreTrainedModel:
    """Load a compressed model; raise ValueError for a dense one."""
    model = load_model(directory)
    if not is_compressed(model):
        raise ValueError(f"model: expected one compressed by embkern, got a dense one: {directory}")
    return model
