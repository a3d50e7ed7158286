"""What the methods of row tables share: the dtype of what they store, and the error they choose by."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Storage = Literal["table", "float16"]


def storage_dtype(table: Tensor, storage: Storage) -> torch.dtype:
    """Return the dtype that ``storage`` names."""
    return torch.float16 if storage == "float16" else table.dtype


def narrow_dtype(table: Tensor) -> torch.dtype:
    """Return the dtype of scales and codebooks: bf16 for a bf16 table, else fp16."""
    return torch.bfloat16 if table.dtype == torch.bfloat16 else torch.float16


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in the dtype in which they are stored.

    Raises:
        ValueError: a value exceeds the range of that dtype.
    """
    stored = values.to(dtype)
    if not torch.isfinite(stored).all():
        raise ValueError(f"table: expected values that {dtype} can hold, got {values.abs().max():.3g}")
    return stored


def direction_error(rows: Tensor, copies: Tensor) -> float:
    """Return the mean over rows of 1 - cos(row, copy); a row of zeros has an error of 1."""
    return float((1 - F.cosine_similarity(rows.double(), copies.double(), eps=1e-30)).mean())
