"""What the modules over both kinds of tables share: the table's tensors as parameters and buffers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.backends import DTYPES, Backend
from ..tables import Table


class TableModule(nn.Module):
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

    def share(self, other: TableModule) -> None:
        """Hold the tensors of another module from now on."""
        for name in self.tensor_names:
            if name not in other._buffers:
                self.register_parameter(name, getattr(other, name))
        self.share_codes(other)

    def share_codes(self, other: TableModule) -> None:
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


class CompressedEmbedding(TableModule):
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


class CompressedHead(TableModule):
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
