"""Factors: the small tensors that replace an embedding table, in memory and in a file."""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..io.tensor_format import TensorFormat
from ..ops import gather_project

ACTIVATIONS = (None, "elu")
TENSORS = ("codes", "basis", "offset")
FORMAT = TensorFormat(
    "embkern.factors/1", "factors", required=TENSORS[:2], optional=TENSORS[2:], settings=("activation",)
)


@dataclass(frozen=True, eq=False)
class Factors:
    """A factorised (V, H) table: row i is ``activation(codes[i] @ basis + offset)``.

    It is validated when it is made, unless with ``check=False``, for tensors that are known to fit.

    Attributes:
        codes: (V, r), one row per token.
        basis: (r, H), shared by all rows.
        offset: (H,) or None.
        activation: None, or ``"elu"`` for the non-linear autoencoder of arXiv 2106.08181. A table with an
            activation cannot serve a tied head, which needs ``h @ basis.T @ codes.T``.
        facts: what the method reports about the result, such as its objective (JSON values); ``to`` keeps
            it, ``save`` does not.

    Raises:
        ValueError: the shapes do not fit each other, or the activation is unknown.
        TypeError: the dtypes differ or are not floating-point.
    """

    codes: Tensor
    basis: Tensor
    offset: Tensor | None = None
    activation: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    check: InitVar[bool] = field(default=True, kw_only=True)

    def __post_init__(self, check: bool) -> None:
        if check:
            self.validate()

    def validate(self) -> None:
        """Raise ValueError or TypeError unless shapes, dtypes and activation fit each other."""
        if self.codes.dim() != 2 or self.basis.dim() != 2 or self.codes.shape[1] != self.basis.shape[0]:
            raise ValueError(
                "codes, basis: expected shapes (V, r) and (r, H), "
                f"got {tuple(self.codes.shape)} and {tuple(self.basis.shape)}"
            )
        if 0 in (*self.codes.shape, *self.basis.shape):
            raise ValueError(
                "codes, basis: expected V, r and H of at least 1, "
                f"got shapes {tuple(self.codes.shape)} and {tuple(self.basis.shape)}"
            )
        if self.offset is not None and self.offset.shape != self.basis.shape[1:]:
            raise ValueError(
                f"offset: expected shape ({self.basis.shape[1]},), got {tuple(self.offset.shape)}"
            )
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point() or tensor.dtype != self.codes.dtype:
                raise TypeError(
                    f"{name}: expected a floating-point dtype, that of codes ({self.codes.dtype}), "
                    f"got {tensor.dtype}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {self.activation!r}")

    @property
    def num_embeddings(self) -> int:
        """V, the number of rows."""
        return self.codes.shape[0]

    @property
    def embedding_dim(self) -> int:
        """H, the width of a row."""
        return self.basis.shape[1]

    @property
    def rank(self) -> int:
        """r, the width of a row of codes."""
        return self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every tensor and of the decoded rows."""
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors (a file adds a header of a few hundred bytes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def decode(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape): (``*``, H)."""
        return activate(gather_project(ids, self.codes, self.basis, self.offset), self.activation)

    def to_dense(self) -> Tensor:
        """Return the whole reconstructed table, (V, H)."""
        return self.decode(torch.arange(self.num_embeddings, device=self.codes.device))

    def to(self, *args: Any, **kwargs: Any) -> Factors:
        """Return the factors with every tensor moved or cast as ``Tensor.to`` does.

        Raises:
            TypeError: the dtype is not floating-point.
        """
        moved: dict[str, Any] = {name: each.to(*args, **kwargs) for name, each in self.tensors().items()}
        check_floating(moved["codes"].dtype)
        return Factors(**moved, activation=self.activation, facts=self.facts, check=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factors to one safetensors file; an existing file is replaced atomically."""
        FORMAT.save(path, self.tensors(), activation=self.activation)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, edited, or not a file of factors.
        """
        return FORMAT.load(path, lambda tensors, settings: cls(**tensors, **settings))


def activate(rows: Tensor, activation: str | None) -> Tensor:
    """Return the decoder's activation of rows: ``F.elu(rows)`` for ``"elu"``, ``rows`` for None."""
    return F.elu(rows) if activation == "elu" else rows


def check_floating(dtype: torch.dtype) -> None:
    """Raise TypeError unless a table can be cast to ``dtype``."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def check_rank(rank: int, embedding_dim: int) -> None:
    """Raise TypeError unless ``rank`` is an int, and ValueError unless ``1 <= rank <= H``."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if not 1 <= rank <= embedding_dim:
        raise ValueError(f"rank: expected 1 <= rank <= H = {embedding_dim}, got {rank}")
