"""Modules in the places of nn.Embedding and a tied nn.Linear: over factors, or over a packed table.

Both kinds of table go through ``CompressedEmbedding`` and ``CompressedHead``; what differs between them, the
names of the tensors and how rows are looked up in them, is in ``_OverFactors`` and ``_OverPacked``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import factors, packed
from .factors import ACTIVATIONS, Factors, activate
from .ops import gather_project
from .ops.backends import DTYPES, Backend
from .ops.gather_decode import gather_decode
from .packed import PackedTable
from .packed_logits import packed_logits

Table = Factors | PackedTable


class _Compressed(nn.Module):
    """What embeddings and heads hold of a table: floating-point tensors as parameters, codes as buffers."""

    kind: ClassVar[str]  # in a saved model's config
    table_type: ClassVar[type[Table]]
    tensor_names: ClassVar[tuple[str, ...]]
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {}
    keeps_stored_dtype: ClassVar[bool] = False  # when saved in a wider model
    backend: Backend | None = None

    @staticmethod
    def settings(table: Any) -> dict[str, Any]:
        """Return what a table is made of besides its tensors, as JSON values."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the parameters and of the decoded rows."""
        raise NotImplementedError

    @property
    def table(self) -> Any:
        """The table, sharing memory with the module; ValueError if its tensors do not fit each other."""
        raise NotImplementedError

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        raise NotImplementedError

    def _register(self, table: Table) -> None:
        # Never "bias" or "decoder": transformers pads the one to V and renames the other.
        tensors = {name: tensor.contiguous() for name, tensor in table.tensors().items()}
        for name in self.tensor_names:
            tensor = tensors.get(name)
            if tensor is None or tensor.is_floating_point():
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def share(self, other: _Compressed) -> None:
        """Hold the tensors of another module from now on."""
        for name in self.tensor_names:
            if name not in other._buffers:
                self.register_parameter(name, getattr(other, name))
        self.share_codes(other)

    def share_codes(self, other: _Compressed) -> None:
        """Hold the codes of another module from now on."""
        for name in other._buffers:
            self.register_buffer(name, getattr(other, name))

    def drop_codes(self) -> None:
        """Have no codes until ``share_codes``, so that no checkpoint is asked for them."""
        for name in self._buffers:
            setattr(self, name, None)

    def replace(self, table: Table) -> None:
        """Hold the tensors of a table from now on; a parameter that is there already stays."""
        for name, new in table.tensors().items():
            old = getattr(self, name)
            if new.shape != old.shape or new.data_ptr() != old.data_ptr():
                parameter = isinstance(old, nn.Parameter)
                setattr(self, name, nn.Parameter(new, old.requires_grad) if parameter else new)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name, sharing memory with the module."""
        held = {name: getattr(self, name) for name in self.tensor_names}
        return {name: tensor.detach() for name, tensor in held.items() if tensor is not None}

    @property
    def weight(self) -> Tensor:
        """The whole table (V, H), decoded anew at every read and differentiable.

        It is not a parameter: writing into it (``emb.weight.data[i] = x``) changes nothing. On the meta
        device it is an empty meta tensor.
        """
        tensors = self.tensors()  # while a model is loaded, some arrive before others
        if any(tensor.is_meta for tensor in tensors.values()) or None in self._buffers.values():
            weight = torch.empty(self.shape, dtype=self.dtype, device="meta")
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            return weight
        return self._rows(torch.arange(self.shape[0], device=next(iter(tensors.values())).device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is decoded from {_listed(self.tensor_names)} "
                "and cannot be set; compress a dense table with embkern.compress, or assign those tensors"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            args[-1].append(
                f"{prefix}weight is a dense table, {type(self).__name__} holds {_listed(self.tensor_names)}: "
                "load it into the dense model and compress that"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move as ``nn.Module`` does, buffers in place like parameters: who shares them still does."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            if torch._has_compatible_shallow_copy_type(old, new):
                old.data = new
                self._buffers[name] = old
        return self


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"


class CompressedEmbedding(_Compressed):
    """What the drop-ins for ``nn.Embedding`` share: sizes, ``padding_idx`` and the constant factor."""

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
        """Return a layer over a table of this kind, sharing its memory."""
        raise NotImplementedError

    def head(self, bias: nn.Parameter | None = None) -> CompressedHead:
        """Return the tied output head over the same table."""
        raise NotImplementedError

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

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (any shape, int32 or int64): (``*``, H)."""
        # The ops refuse other dtypes.
        return self._rows(ids, self._rounded_scale.get(self.dtype, self._scale), self.padding_idx)

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the layer."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}", *self._described()]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale:g}")
        return ", ".join(parts)

    def _described(self) -> list[str]:
        raise NotImplementedError


class CompressedHead(_Compressed):
    """What tied output heads share: the embedding's tensors, and the dense head's bias."""

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
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the head."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


# ---- over factors ----------------------------------------------------------------------------------------


class _OverFactors(_Compressed):
    """Parameters codes, basis and perhaps offset."""

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
        """Return what factors are made of besides their tensors."""
        return {"activation": table.activation}

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self.codes.shape[0], self.basis.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the parameters and of the decoded rows."""
        return self.codes.dtype

    @property
    def table(self) -> Factors:
        """The table's factors, sharing memory with the parameters."""
        tensors: dict[str, Any] = self.tensors()
        return Factors(**tensors, activation=self.activation)

    @property
    def factors(self) -> Factors:
        """The same as ``table``."""
        return self.table

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        rows = gather_project(
            ids,
            self.codes,
            self.basis,
            self.offset,
            scale=1.0 if self.activation else scale,
            padding_idx=padding_idx,
            sparse=self.sparse,
            backend=self.backend,
        )
        return activate(rows, self.activation) * scale if self.activation else rows


class FactorizedEmbedding(_OverFactors, CompressedEmbedding):
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

    @classmethod
    def from_table(cls, table: Factors, **kwargs: Any) -> FactorizedEmbedding:
        """Return a layer over factors, sharing their memory: ``from_factors``."""
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


class FactorizedHead(_OverFactors, CompressedHead):
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

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        if embedding.activation is not None:
            raise ValueError(
                f"activation: a tied head cannot be computed through {embedding.activation!r}; "
                "keep the dense head (lm_head='dense') or use the linear autoencoder"
            )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(F.linear(hidden, self.basis), self.codes)
        return logits if self.offset is None else logits + F.linear(hidden, self.offset.unsqueeze(0))


# ---- over a packed table ---------------------------------------------------------------------------------


class _OverPacked(_Compressed):
    """Parameters scales and perhaps basis and offset; buffers records, directory, tiers and levels.

    The buffers are whole numbers: no cast of a model touches them.
    """

    kind = "packed"
    table_type = PackedTable
    tensor_names = packed.TENSORS
    code_dtypes: ClassVar[dict[str, torch.dtype]] = {
        "records": torch.int32,
        "directory": torch.int32,
        "tiers": torch.uint8,
        "levels": torch.int16,
    }
    keeps_stored_dtype = True
    records: Tensor
    directory: Tensor
    tiers: Tensor
    levels: Tensor
    scales: nn.Parameter
    basis: nn.Parameter | None
    offset: nn.Parameter | None
    _width: int

    @staticmethod
    def settings(table: PackedTable) -> dict[str, Any]:
        """Return what a packed table is made of besides its tensors."""
        return {"embedding_dim": table.embedding_dim}

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        return self.scales.shape[0], self._width

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the parameters and of the decoded rows."""
        return self.scales.dtype

    @property
    def table(self) -> PackedTable:
        """The packed table, sharing memory with the module; ValueError if its tensors are damaged."""
        tensors: dict[str, Any] = self.tensors()
        return PackedTable(**tensors, embedding_dim=self._width)

    def _in_order(self) -> tuple[Any, ...]:
        codes = (self.records, self.directory, self.tiers, self.levels)
        return *codes, self.scales, self.basis, self.offset

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        return gather_decode(
            ids,
            *self._in_order(),
            embedding_dim=self._width,
            scale=scale,
            padding_idx=padding_idx,
            backend=self.backend,
        )


class PackedEmbedding(_OverPacked, CompressedEmbedding):
    """Drop-in for ``nn.Embedding`` over a ``PackedTable``.

    ``forward(ids) = gather_decode(ids, records, ..., scales, basis, offset) * scale``

    Scales, basis and offset train; the codes are frozen.

    Args:
        table: whose memory the layer shares.
        padding_idx: positions with this id contribute no gradient. Its row is decoded like every other.
        scale: constant factor on the output, rounded to its dtype. ``weight`` is the unscaled table.
        backend: passed to ``gather_decode``; None takes the best for the device.

    Raises:
        ValueError: ``padding_idx`` is out of range.
    """

    def __init__(
        self,
        table: PackedTable,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, padding_idx, scale, backend)
        self._width = table.embedding_dim
        self._register(table)

    @classmethod
    def from_table(cls, table: PackedTable, **kwargs: Any) -> PackedEmbedding:
        """Return a layer over a packed table, sharing its memory."""
        return cls(table, **kwargs)

    def head(self, bias: nn.Parameter | None = None) -> PackedHead:
        """Return the tied output head over the same packed table."""
        return PackedHead(self, bias)

    def _described(self) -> list[str]:
        return [f"tiers={len(self.tiers)}"]


class PackedHead(_OverPacked, CompressedHead):
    """The tied output head over the same packed table, decoded some hundred rows at a time.

    ``forward(h) = F.linear(h, weight, bias)`` where ``weight`` is the decoded table, of which forward and
    backward never hold more than a piece.

    Args:
        embedding: the embedding whose tensors the head shares. Its ``scale`` is not applied, as tied heads
            use the unscaled table.
        bias: the dense head's bias (V,), if it has one.
    """

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding, bias)
        self._width = embedding.embedding_dim

    def _logits(self, hidden: Tensor) -> Tensor:
        return packed_logits(hidden, self._in_order(), backend=self.backend)


KINDS: dict[str, type[CompressedEmbedding]] = {
    layer.kind: layer for layer in (FactorizedEmbedding, PackedEmbedding)
}


def layer_of(table: Table) -> type[CompressedEmbedding]:
    """Return the embedding for tables of this kind."""
    return next(layer for layer in KINDS.values() if isinstance(table, layer.table_type))


def check_rank(rank: int, embedding_dim: int) -> None:
    """Raise unless 1 <= rank <= H."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if not 1 <= rank <= embedding_dim:
        raise ValueError(f"rank: expected 1 <= rank <= H = {embedding_dim}, got {rank}")
