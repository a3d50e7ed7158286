"""The result of a format that embkern has no table for: the decoded rows, and the bytes that it stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A (V, H) table as another format reconstructs it; no model can hold it.

    The rows are decoded from values that are rounded as they would be stored. ``parts`` counts the bytes of
    all these values, with the bits of each tensor rounded up to whole bytes.

    Attributes:
        rows: (V, H) fp32.
        parts: bytes by name: codes, scales, books, decoder, ...
        facts: settings of the format.

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
