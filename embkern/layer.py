"""FactorizedEmbedding and FactorizedHead: factors in the places of nn.Embedding and a tied nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factors import ACTIVATIONS, Factors, activate
from .ops import gather_project
from .ops.backends import DTYPES, Backend


class _FactorizedTable(nn.Module):
    """What both modules hold: the parameters codes, basis and offset, and the table they stand for."""

    codes: nn.Parameter
    basis: nn.Parameter
    offset: nn.Parameter | None
    activation: str | None = None
    backend: Backend | None = None

    def _register(self, factors: Factors) -> None:
        # Never "bias" or "decoder": transformers pads the one to V and renames the other.
        self.codes = nn.Parameter(factors.codes)
        self.basis = nn.Parameter(factors.basis)
        offset = None if factors.offset is None else nn.Parameter(factors.offset)
        self.register_parameter("offset", offset)

    @property
    def factors(self) -> Factors:
        """The table's factors, sharing memory with the parameters."""
        offset = None if self.offset is None else self.offset.detach()
        return Factors(self.codes.detach(), self.basis.detach(), offset, self.activation)

    @property
    def weight(self) -> Tensor:
        """The whole table (V, H), decoded anew at every read and differentiable.

        It is not a parameter: writing into it (``emb.weight.data[i] = x``) changes nothing. On the meta
        device it is an empty meta tensor.
        """
        if any(parameter.is_meta for parameter in self.parameters()):  # some arrive before others
            weight = self.codes.new_empty(self.codes.shape[0], self.basis.shape[1])
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            return weight
        ids = torch.arange(self.codes.shape[0], device=self.codes.device)
        rows = gather_project(ids, self.codes, self.basis, self.offset, backend=self.backend)
        return activate(rows, self.activation)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is decoded from codes, basis and offset and cannot be set; "
                "compress a dense table with embkern.compress, or assign the factors"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            args[-1].append(
                f"{prefix}weight is a dense table, {type(self).__name__} holds codes, basis and offset: "
                "load it into the dense model and compress that"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class FactorizedEmbedding(_FactorizedTable):
    """Drop-in for ``nn.Embedding`` whose table is ``codes @ basis + offset``.

    ``forward(ids) = activation(F.embedding(ids, codes) @ basis + offset) * scale``

    Args:
        num_embeddings: V, size of the vocabulary.
        embedding_dim: H, width of a row.
        rank: r, width of the codes, 1 to H.
        padding_idx: positions with this id contribute no gradient, to codes, basis and offset alike. Its
            row is decoded like every other.
        offset: whether there is an offset (H,).
        activation: None or ``"elu"``, applied to the decoded row.
        scale: constant factor on the output, rounded to its dtype, as in models that scale embeddings by
            ``sqrt(H)``. ``weight`` is the unscaled table.
        sparse: whether the gradient of ``codes`` is a sparse tensor, as in ``nn.Embedding``.
        backend: passed to ``gather_project``; None takes the best for the device.

    The parameters are initialised so that a decoded row has unit variance, like ``nn.Embedding``'s.

    Raises:
        ValueError: a size, ``padding_idx`` or the activation is out of range.
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
        super().__init__()
        for name, value in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_rank(rank, embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: expected an id below {num_embeddings}, got {padding_idx}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.activation = activation
        self.scale = scale
        self.sparse = sparse
        self.backend = backend
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

    @property
    def scale(self) -> float:
        """Constant factor on the output."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = float(value)
        # Models keep their scale in the weights' dtype.
        self._rounded_scale = {
            dtype: torch.tensor(self._scale, dtype=dtype, device="cpu").item() for dtype in DTYPES
        }

    def reset_parameters(self) -> None:
        """Draw codes ~ N(0, 1) and basis ~ N(0, 1/r); the offset is zero."""
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
        """Return a layer over ``factors``, sharing their memory."""
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

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64): (``*``, H)."""
        scale = self._rounded_scale.get(self.codes.dtype, self._scale)  # the op refuses other dtypes
        rows = gather_project(
            ids,
            self.codes,
            self.basis,
            self.offset,
            scale=1.0 if self.activation else scale,
            padding_idx=self.padding_idx,
            sparse=self.sparse,
            backend=self.backend,
        )
        return activate(rows, self.activation) * scale if self.activation else rows

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.offset is not None:
            parts.append("offset=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        if self.sparse:
            parts.append("sparse=True")
        return ", ".join(parts)


class FactorizedHead(_FactorizedTable):
    """The tied output head over the same factors: never through a dense (V, H) table.

    ``forward(h) = F.linear(h, codes @ basis + offset, bias)`` computed as
    ``(h @ basis.T) @ codes.T + h @ offset + bias``

    Args:
        embedding: the embedding whose parameters the head shares. Its ``scale`` is not applied, as tied
            heads use the unscaled table.
        bias: the dense head's bias (V,), if it has one.

    Raises:
        ValueError: the table has an activation, so that the product does not factorise.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if embedding.activation is not None:
            raise ValueError(
                f"activation: a tied head cannot be computed through {embedding.activation!r}; "
                "keep the dense head (lm_head='dense') or use the linear autoencoder"
            )
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.codes, self.basis = embedding.codes, embedding.basis
        self.register_parameter("offset", embedding.offset)
        self.register_parameter("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (``*``, V) for hidden states (``*``, H)."""
        logits = nn.functional.linear(nn.functional.linear(hidden, self.basis), self.codes)
        if self.offset is not None:
            logits = logits + nn.functional.linear(hidden, self.offset.unsqueeze(0))
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the head."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.basis.shape[0]}, bias={self.bias is not None}"
        )


def check_rank(rank: int, embedding_dim: int) -> None:
    """Raise unless 1 <= rank <= H."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if not 1 <= rank <= embedding_dim:
        raise ValueError(f"rank: expected 1 <= rank <= H = {embedding_dim}, got {rank}")
