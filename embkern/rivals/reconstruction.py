"""The result of a method for comparison: the decoded table, and the bytes that it would store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Storage = Literal["table", "float16"]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A (V, H) table as a rival reconstructs it; no model can hold it.

    The rows are decoded from values that are rounded as they would be stored. ``parts`` counts the bytes of
    all these values, with the bits of each tensor rounded up to whole bytes.

    Attributes:
        rows: (V, H) fp32.
        parts: bytes by name: codes, scales, books, decoder, ...
        facts: settings that the method chose for the ratio.

    Raises:
        ValueError: the rows are not (V, H) fp32.
    """

    rows: Tensor
    parts: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows.dim() != 2 or self.rows.dtype != torch.float32:
            raise ValueError(f"rows: expected (V, H) float32, got {tuple(self.rows.shape)} {self.rows.dtype}")

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows of the table."""
        return self.rows.shape[0]

    @property
    def embedding_dim(self) -> int:
        """H, the width of the table."""
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes of everything that would be stored."""
        return sum(self.parts.values())

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H) fp32."""
        return self.rows


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 8)


def half(values: Tensor) -> Tensor:
    """Return values in fp32, rounded to fp16 as they would be stored.

    Raises:
        ValueError: a value exceeds the range of fp16.
    """
    rounded = values.half()
    if not torch.isfinite(rounded).all():
        raise ValueError(f"table: expected values that fp16 can hold, got {values.abs().max():.3g}")
    return rounded.float()


def storage_dtype(table: Tensor, storage: Storage) -> torch.dtype:
    """Return the dtype that ``storage`` names."""
    return torch.float16 if storage == "float16" else table.dtype


def direction_error(rows: Tensor, copies: Tensor) -> float:
    """Return the mean over rows of 1 - cos(row, copy); a row of zeros has an error of 1."""
    return float((1 - F.cosine_similarity(rows.double(), copies.double(), eps=1e-30)).mean())
