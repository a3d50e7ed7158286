"""What a method for comparison gives back: the decoded table, and the bytes that it would have to store."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import check_table
from .direction import checked_weights

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


def byte_budget(table: Tensor, ratio: float) -> int:
    """Return the bytes that ``1 / ratio`` of a table, as stored, may take; raise if either is not usable."""
    check_table(table)
    if not (ratio >= 1 and math.isfinite(ratio)):
        raise ValueError(f"ratio: expected at least 1 (bytes before over bytes after), got {ratio}")
    budget = int(table.nbytes / ratio)
    # The division may have rounded down what fits exactly.
    return budget + ((budget + 1) * ratio <= table.nbytes * (1 + 1e-12))


def refuse_ratio(table: Tensor, ratio: float, least: int) -> ValueError:
    """Return the error of a ratio that leaves less than the ``least`` bytes a method can do with."""
    highest = math.floor(table.nbytes / least * 1000) / 1000
    return ValueError(
        f"ratio: {ratio:g} leaves no room for a {table.shape[0]} x {table.shape[1]} table"
        + (
            f"; the highest that fits is {highest:g}"
            if highest >= 1
            else ", which cannot be made smaller by this method"
        )
    )


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


def row_weights(counts: Tensor | None, num_embeddings: int, exponent: float) -> Tensor:
    """Return ``counts ** exponent`` with a mean of 1, (V,) float64 on the CPU; all 1 without counts.

    Raises:
        ValueError: counts are not (V,), negative, not finite, or all zero.
    """
    if counts is None:
        return torch.ones(num_embeddings, dtype=torch.float64)
    weights = checked_weights("counts", counts, num_embeddings).cpu()
    if not weights.any():
        raise ValueError("counts: expected one above 0, got none")
    weights = (weights / weights.max()) ** exponent
    return weights / weights.mean()


def direction_error(rows: Tensor, copies: Tensor) -> float:
    """Mean over rows of 1 - cos(row, copy); a row of zeros counts as 1."""
    return float((1 - F.cosine_similarity(rows.double(), copies.double(), eps=1e-30)).mean())
