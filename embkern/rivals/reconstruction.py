"""What a method for comparison gives back: the decoded table, and the bytes that it would have to store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Storage = Literal["table", "float16"]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A (V, H) table as a neighbour of embkern's methods gives it back; no model can hold it.

    The rows are decoded from values rounded as they would be stored, and ``parts`` counts the bytes of all
    of them, bits to whole bytes per tensor.

    Attributes:
        rows: (V, H) fp32.
        parts: bytes by name: codes, scales, books, decoder, ...
        facts: what the method chose for the ratio.
    """

    rows: Tensor
    parts: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows.dim() != 2 or self.rows.dtype != torch.float32:
            raise ValueError(f"rows: expected (V, H) float32, got {tuple(self.rows.shape)} {self.rows.dtype}")

    @property
    def num_embeddings(self) -> int:
        """V, the rows of the table."""
        return self.rows.shape[0]

    @property
    def embedding_dim(self) -> int:
        """H, the width of the table."""
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that would be stored."""
        return sum(self.parts.values())

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H) fp32."""
        return self.rows


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of some bits each."""
    return -(-count * bits // 8)


def half(values: Tensor) -> Tensor:
    """Return values in fp32, rounded to fp16 as they would be stored.

    Raises:
        ValueError: one of them is beyond fp16.
    """
    rounded = values.half()
    if not torch.isfinite(rounded).all():
        raise ValueError(f"table: expected values that fp16 can hold, got {values.abs().max():.3g}")
    return rounded.float()


def storage_dtype(table: Tensor, storage: Storage) -> torch.dtype:
    """Return the dtype that ``storage`` names."""
    return torch.float16 if storage == "float16" else table.dtype


def direction_error(rows: Tensor, copies: Tensor) -> float:
    """Mean over rows of 1 - cos(row, copy); a row of zeros counts as 1."""
    return float((1 - F.cosine_similarity(rows.double(), copies.double(), eps=1e-30)).mean())
