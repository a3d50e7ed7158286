"""``FactorizedEmbedding`` and ``FactorizedHead``, over ``Factors``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gather_project, low_rank_cross_entropy
from ..ops.backends import Backend
from ..tables import factors
from ..tables.factors import ACTIVATIONS, Factors, activate, check_rank
from .adjustment import inverse
from .base import CompressedEmbedding, CompressedHead
from .table_module import TableModule


class FactorsModule(TableModule):
    """Holds ``Factors``: parameters codes, basis and offset, or None for the offset."""

    kind = "factors"
    table_type = Factors
    tensor_names = factors.TENSORS
    codes: nn.Parameter
    basis: nn.Parameter
    offset: nn.Parameter | None
    activation: str | None = None
    sparse = False

    @staticmethod
    def settings(table: Factors) -> dict[str, Any]:
        """Return the fields of factors that are not tensors."""
        return {"activation": table.activation}

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self.codes.shape[0], self.basis.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the decoded rows."""
        return self.codes.dtype

    @property
    def table(self) -> Factors:
        """The factors, which share memory with the parameters; they are not validated."""
        tensors: dict[str, Any] = self.tensors()
        return Factors(**tensors, activation=self.activation, check=False)

    @property
    def factors(self) -> Factors:
        """Another name of ``table``."""
        return self.table

    def _units(self) -> dict[str, Tensor]:
        """Return what a change of 1 means: in length of a row, for codes, and in entries of rows.

        Rows of the basis that are not orthogonal reinforce each other, by their spectral norm at most.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        codes, basis = self.codes.to(wide), self.basis.to(wide)
        lengths = inverse(torch.linalg.vector_norm(basis, dim=1))
        directions = basis * lengths.unsqueeze(1)
        return {
            "codes": lengths * inverse(torch.linalg.matrix_norm(directions, ord=2)),
            "basis": inverse(codes.abs().sum(1).mean()),
            "offset": torch.ones(()),
        }

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        rows = gather_project(
            ids,
            self._trained("codes"),
            self._trained("basis"),
            self._trained("offset"),
            scale=1.0 if self.activation else scale,
            padding_idx=padding_idx,
            sparse=self.sparse,
            backend=self.backend,
        )
        rows = rows.to(self.dtype)
        return activate(rows, self.activation) * scale if self.activation else rows


class FactorizedEmbedding(FactorsModule, CompressedEmbedding):
    """Drop-in for ``nn.Embedding`` whose table is ``codes @ basis + offset``.

    ``forward(ids) = activation(F.embedding(ids, codes) @ basis + offset) * scale``, (``*``) to (``*``, H)

    Parameters are codes (V, r), basis (r, H) and offset (H,) or None. They are initialised so that the
    entries of a decoded row have unit variance, as in ``nn.Embedding``.

    Args:
        num_embeddings: V, size of the vocabulary.
        embedding_dim: H, width of a row.
        rank: r, width of the codes, 1 to H.
        padding_idx: positions with this id contribute no gradient to codes, basis and offset. Its row is
            decoded like every other.
        offset: whether there is an offset.
        activation: None or ``"elu"``, applied to the decoded row.
        scale: constant factor of the output, rounded to its dtype, as in models that scale embeddings by
            ``sqrt(H)``. ``weight`` is the unscaled table.
        sparse: whether the gradient of ``codes`` is a sparse tensor, as in ``nn.Embedding``.
        backend: passed to ``gather_project``; None chooses by device and dtype.
        device, dtype: of the parameters; None takes torch's defaults.

    Raises:
        ValueError: a size, ``padding_idx`` or the activation is out of range.
        TypeError: ``rank`` is not an int, or ``dtype`` is not floating-point.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        offset: bool = False,
        activation: str | None = None,
        scale: float = 1.0,
        sparse: bool = False,
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_rank(rank, embedding_dim)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        super().__init__(num_embeddings, embedding_dim, padding_idx, scale, backend)
        self.rank = rank
        self.activation = activation
        self.sparse = sparse
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self._register(
            Factors(
                torch.empty(num_embeddings, rank, **kwargs),
                torch.empty(rank, embedding_dim, **kwargs),
                torch.empty(embedding_dim, **kwargs) if offset else None,
                activation,
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw codes from N(0, 1) and basis from N(0, 1/r), and set the offset to zero."""
        nn.init.normal_(self.codes)
        nn.init.normal_(self.basis, std=self.rank**-0.5)
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    @classmethod
    def from_factors(
        cls,
        factors: Factors,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        sparse: bool = False,
        backend: Backend | None = None,
    ) -> FactorizedEmbedding:
        """Return an embedding over ``factors``, which shares their memory."""
        layer = cls(
            factors.num_embeddings,
            factors.embedding_dim,
            factors.rank,
            padding_idx=padding_idx,
            offset=factors.offset is not None,
            activation=factors.activation,
            scale=scale,
            sparse=sparse,
            backend=backend,
            device="meta",
            dtype=factors.dtype,
        )
        layer._register(factors)
        return layer

    @classmethod
    def from_table(cls, table: Factors, **kwargs: Any) -> FactorizedEmbedding:
        """Return ``from_factors(table, **kwargs)``."""
        return cls.from_factors(table, **kwargs)

    def head(self, bias: nn.Parameter | None = None) -> FactorizedHead:
        """Return the tied output head over the same factors."""
        return FactorizedHead(self, bias)

    def _described(self) -> list[str]:
        parts = [f"rank={self.rank}"]
        if self.offset is not None:
            parts.append("offset=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.sparse:
            parts.append("sparse=True")
        return parts


class FactorizedHead(FactorsModule, CompressedHead):
    """The tied output head over the factors of an embedding; it never materialises the (V, H) table.

    ``forward(h) = F.linear(h, codes @ basis + offset, bias)``, (``*``, H) to (``*``, V), computed as
    ``(h @ basis.T) @ codes.T + h @ offset + bias``

    Args:
        embedding: the embedding whose parameters the head shares. Its ``scale`` is not applied, as tied
            heads use the unscaled table.
        bias: (V,) or None.

    Raises:
        ValueError: the table has an activation, so that the product does not factorise.
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        if embedding.activation is not None:
            raise ValueError(
                f"activation: a tied head cannot be computed through {embedding.activation!r}; "
                "keep the dense head (lm_head='dense') or use the linear autoencoder"
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        codes, basis, offset = (self._trained(name) for name in self.tensor_names)
        wide = hidden.to(codes.dtype)  # an adjustment can be wider than the model
        logits = F.linear(F.linear(wide, basis), codes)
        logits = logits if offset is None else logits + F.linear(wide, offset.unsqueeze(0))
        return logits if wide is hidden else logits.to(hidden.dtype)

    def loss(self, hidden: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Return the cross-entropy of the logits, never held as a whole: see ``low_rank_cross_entropy``."""
        codes, basis, offset = (self._trained(name) for name in self.tensor_names)
        return low_rank_cross_entropy(
            hidden.to(codes.dtype), labels, codes, basis, offset, bias=self.bias, **options
        )
