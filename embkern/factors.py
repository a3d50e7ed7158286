"""Factors: the small tensors that replace an embedding table, in memory and in a file."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import replacing
from .ops import gather_project

FORMAT = "embkern.factors/1"
ACTIVATIONS = (None, "elu")
TENSORS = ("codes", "basis", "offset")


@dataclass(frozen=True, eq=False)
class Factors:
    """A factorised (V, H) table: row i is ``activation(codes[i] @ basis + offset)``.

    Attributes:
        codes: (V, r), one row per token.
        basis: (r, H), shared by all rows.
        offset: (H,) or None.
        activation: None, or ``"elu"`` for the non-linear autoencoder of arXiv 2106.08181. A table with an
            activation cannot serve a tied head, which needs ``h @ basis.T @ codes.T``.
        facts: what the method has to say of the result, such as its objective; values of JSON, kept by
            ``to`` and not saved.

    Raises:
        ValueError: shapes do not fit each other, or the activation is unknown.
        TypeError: the dtypes differ or are not floating-point.
    """

    codes: Tensor
    basis: Tensor
    offset: Tensor | None = None
    activation: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.basis.dim() != 2 or self.codes.shape[1] != self.basis.shape[0]:
            raise ValueError(
                "codes, basis: expected shapes (V, r) and (r, H), "
                f"got {tuple(self.codes.shape)} and {tuple(self.basis.shape)}"
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
        """V, the rows of the table."""
        return self.codes.shape[0]

    @property
    def embedding_dim(self) -> int:
        """H, the width of the table."""
        return self.basis.shape[1]

    @property
    def rank(self) -> int:
        """r, the width of the codes."""
        return self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of every tensor and of the decoded rows."""
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as stored (a file adds a header of some hundred bytes)."""
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
        """Return the factors with every tensor moved or cast as ``Tensor.to`` does."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()}
        return Factors(**moved, activation=self.activation, facts=self.facts)

    def save(self, path: str | os.PathLike) -> None:
        """Write the factors to one safetensors file; a file already there is replaced whole or not at all."""
        metadata = {
            "format": FORMAT,
            "activation": json.dumps(self.activation),
            "checksums": json.dumps({name: checksum(tensor) for name, tensor in self.tensors().items()}),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Factors:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, edited, or not a file of factors.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file of factors, found none at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}")
        try:
            checksums = json.loads(metadata["checksums"])
            activation = json.loads(metadata["activation"])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: its metadata is damaged ({error!r})") from error
        if (
            not isinstance(checksums, dict)
            or set(tensors) != set(checksums)
            or not {"codes", "basis"} <= set(tensors) <= set(TENSORS)
        ):
            raise ValueError(f"{path}: expected codes, basis and perhaps offset, got {sorted(tensors)}")
        verify_checksums(tensors, checksums, str(path))
        try:
            return cls(**tensors, activation=activation)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def activate(rows: Tensor, activation: str | None) -> Tensor:
    """Apply the decoder's activation."""
    return F.elu(rows) if activation == "elu" else rows


def checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, to notice a damaged or edited file."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"crc32:{zlib.crc32(data):08x}"


def verify_checksums(tensors: dict[str, Tensor], checksums: dict[str, str], source: str) -> None:
    """Raise ValueError if a tensor is not the one that was saved."""
    for name, expected in checksums.items():
        if (got := checksum(tensors[name])) != expected:
            raise ValueError(
                f"{source}: {name} was changed after it was saved (expected {expected}, got {got}); "
                "the file is damaged or edited"
            )
