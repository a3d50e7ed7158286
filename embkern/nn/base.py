"""Base classes of compressed embeddings and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.backends import DTYPES, Backend
from .table_module import TableModule


class CompressedEmbedding(TableModule):
    """Base class of the replacements of ``nn.Embedding``: sizes, ``padding_idx`` and the output's scale."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        scale: float,
        backend: Backend | None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected an id below {num_embeddings}, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.scale = scale
        self.backend = backend

    @classmethod
    def from_table(cls, table: Any, **kwargs: Any) -> CompressedEmbedding:
        """Return an embedding over ``table``, which shares its memory."""
        raise NotImplementedError

    def head(self, bias: nn.Parameter | None = None) -> CompressedHead:
        """Return the tied output head over the same table."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Constant factor of the output."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = float(value)
        # Models round their scale to the dtype of the weights.
        self._rounded_scale = {
            dtype: torch.tensor(self._scale, dtype=dtype, device="cpu").item() for dtype in DTYPES
        }

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64), times ``scale``: (``*``, H)."""
        return self._rows(ids, self._rounded_scale.get(self.dtype, self._scale), self.padding_idx)

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}", *self._described()]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        return ", ".join(parts)

    def _described(self) -> list[str]:
        """Return the arguments of the subclass for ``extra_repr``."""
        raise NotImplementedError


class CompressedHead(TableModule):
    """Base class of tied output heads: they share the tensors of an embedding and have a bias or None."""

    bias: nn.Parameter | None

    def __init__(self, embedding: CompressedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.backend = embedding.backend
        self.share(embedding)
        self.register_parameter("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (``*``, V) for hidden states (``*``, H)."""
        logits = self._logits(hidden)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits without bias."""
        raise NotImplementedError

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the cross-entropy of the logits, which are never held as a whole.

        ``F.cross_entropy(self(hidden), labels, **options)``

        Args:
            hidden: (``*``, H).
            labels: (``*``), int32 or int64.
            options: ignore_index, label_smoothing, softcap and reduction of ``packed_cross_entropy``.

        Returns:
            As ``packed_cross_entropy``: float32 (float64 for float64).
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"
