"""``TableModule``: a table's tensors as parameters and buffers of a module."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import MutableMapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..io.errors import EmbkernWarning
from ..ops.backends import Backend
from ..tables import Table
from .adjustment import Adjustment
from .decoded_weight import DecodedWeight

GUARD = "weight"  # name of a tensor without values in a saved model, at which a dense embedding refuses it
_ADVICE = (
    "To change rows: decode the model (model.dequantize(), embkern export), write into the dense table, and "
    "compress it again; weight.clone() is an ordinary tensor"
)
_UNFREEZE = (
    "the table of a compressed model is frozen; to train it, call embkern.unfreeze_table(model) before the "
    "optimizer is made"
)
ADJUSTMENT = "adjustment"
AnyTableModule = TypeVar("AnyTableModule", bound="TableModule")


class TableModule(nn.Module):
    """Holds a table: its floating-point tensors as parameters, its integer tensors as buffers.

    Attributes:
        kind: name of the kind of table in a saved model's config.
        table_type: class of the table.
        tensor_names: names of the table's tensors.
        code_names: names of those that are integers.
        keeps_stored_dtype: whether a wider model saves the table in the dtype in which it was stored.
        frozen: whether gradients stop at the stored tensors, as in models, where only an ``Adjustment`` is
            trained.
        backend: backend of the lookup; None chooses by device and dtype.
        table_name: name of the table in the model; empty for the input table.
        leads: whether the other modules of the table share the tensors of this one.
    """

    kind: ClassVar[str]
    table_type: ClassVar[type[Table]]
    tensor_names: tuple[str, ...]
    code_names: ClassVar[tuple[str, ...]] = ()
    keeps_stored_dtype: ClassVar[bool] = False
    frozen: bool = False
    backend: Backend | None = None
    table_name: str = ""
    leads: bool = False

    @classmethod
    def code_dtype(cls, name: str, shape: tuple[int, ...]) -> torch.dtype | None:
        """Return the dtype of an integer tensor of a table and of files; None for the others."""
        return None

    @classmethod
    def held_dtype(cls, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the module holds a tensor that a table has in this one."""
        return dtype

    @staticmethod
    def settings(table: Any) -> dict[str, Any]:
        """Return the fields of a table that are not tensors, as JSON values."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H) of the table."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of the decoded rows."""
        raise NotImplementedError

    @property
    def table(self) -> Any:
        """The table, which shares memory with the module; it is not validated."""
        raise NotImplementedError

    def _rows(self, ids: Tensor, scale: float = 1.0, padding_idx: int | None = None) -> Tensor:
        """Return ``scale`` times the rows of ids, without gradients at ``padding_idx``."""
        raise NotImplementedError

    def _units(self) -> dict[str, Tensor]:
        """Return the unit of each floating-point tensor, for ``Adjustment``."""
        raise NotImplementedError

    @property
    def adjustment(self) -> Adjustment | None:
        """The trainable change of the table, or None."""
        return cast("Adjustment | None", self._modules.get(ADJUSTMENT))

    def _trained(self, name: str) -> Any:
        """Return a floating-point tensor, or None, as lookups use it: adjusted, or detached if frozen."""
        stored = getattr(self, name)
        if stored is None or not self.frozen:
            return stored
        adjustment = self.adjustment
        if adjustment is not None:
            return adjustment.adjusted(name, stored)
        if stored.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            message = f"{type(self).__name__}.{name} gets no gradients: {_UNFREEZE}"
            warnings.warn(message, EmbkernWarning, stacklevel=2)
        return stored.detach()

    def _is_trained(self) -> bool:
        """Return whether gradients flow through lookups."""
        if not self.frozen:
            return any(stored.requires_grad for stored in self._stored().values())
        adjustment = self.adjustment
        return adjustment is not None and any(change.requires_grad for change in adjustment.parameters())

    @torch.no_grad()
    def unfreeze(self) -> Adjustment:
        """Make the table trainable relative to what is stored; return the new parameters, or those it has."""
        if (adjustment := self.adjustment) is None:
            stored = {n: t for n, t in self._stored().items() if t.is_floating_point()}
            adjustment = Adjustment(stored, self._units())
            self.adjust(adjustment)
        return adjustment

    def adjust(self, adjustment: Adjustment | None) -> None:
        """Train this adjustment, which modules with the same tensors share, from now on; None trains none."""
        self.frozen = True
        self._modules.pop(ADJUSTMENT, None)
        if adjustment is not None:
            self._modules[ADJUSTMENT] = adjustment
        for parameter in self._parameters.values():
            if parameter is not None and parameter is not getattr(self, "bias", None):
                parameter.requires_grad_(False)

    @torch.no_grad()
    def fold(self) -> None:
        """Add the changes that were trained to the stored tensors, and begin again from zero."""
        if (adjustment := self.adjustment) is not None:
            for name, stored in self._stored().items():
                if stored.is_floating_point():
                    stored.copy_(adjustment.adjusted(name, stored))
            adjustment.reset()

    def requires_grad_(self: AnyTableModule, requires_grad: bool = True) -> AnyTableModule:
        """Set whether parameters are trained: of the table in a model, those of its adjustment.

        Raises:
            RuntimeError: there is none. To make one for this module alone would part it from a tied head.
        """
        if self.frozen and requires_grad and self.adjustment is None:
            raise RuntimeError(f"{type(self).__name__}: {_UNFREEZE}")
        super().requires_grad_(requires_grad)
        if self.frozen:
            self.adjust(self.adjustment)
        return self

    def _register(self, table: Table) -> None:
        """Register the tensors of a table under their names.

        No name may be "bias" or contain "decoder": transformers pads the former to V and renames the latter.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self._as_held(table).items()}
        for name in self.tensor_names:
            tensor = tensors.get(name)
            if tensor is None or tensor.is_floating_point():
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def _as_held(self, table: Table) -> dict[str, Tensor]:
        """Return the tensors of a table, by name, in the dtypes in which the module holds them."""
        given = table.tensors().items()
        return {name: tensor.to(self.held_dtype(name, tensor.dtype)) for name, tensor in given}

    def cast_to_held(self) -> None:
        """Cast tensors to the dtypes in which the module holds them; a loader may have kept a file's."""
        for name in self.code_names:
            tensor = getattr(self, name)
            setattr(self, name, tensor.to(self.held_dtype(name, tensor.dtype)))

    def share(self, other: TableModule) -> None:
        """Replace this module's tensors by those of another one."""
        for name in self.tensor_names:
            if name not in other._buffers:
                self.register_parameter(name, getattr(other, name))
        self.share_codes(other)
        if other.frozen:
            self.adjust(other.adjustment)

    def share_codes(self, other: TableModule) -> None:
        """Replace this module's integer tensors by those of another one."""
        for name in other._buffers:
            self.register_buffer(name, getattr(other, name))

    def drop_codes(self) -> None:
        """Remove the integer tensors until ``share_codes``, so that they are not expected in a checkpoint."""
        for name in self._buffers:
            setattr(self, name, None)

    def replace(self, table: Table) -> None:
        """Replace the tensors by those of a table; a parameter that already shares its memory is kept."""
        for name, new in self._as_held(table).items():
            old = getattr(self, name)
            if new.shape != old.shape or new.data_ptr() != old.data_ptr():
                parameter = isinstance(old, nn.Parameter)
                setattr(self, name, nn.Parameter(new, old.requires_grad) if parameter else new)

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name, without changes that are being trained."""
        held = {name: getattr(self, name) for name in self.tensor_names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that exist, by name, detached, in the dtype of the module.

        They share memory with the module unless they have an adjustment.
        """
        adjustment, found = self.adjustment, {}
        for name, stored in self._stored().items():
            if adjustment is not None and stored.is_floating_point():
                found[name] = adjustment.adjusted(name, stored).to(stored.dtype)
            else:
                found[name] = stored.detach()
        return found

    @property
    def weight(self) -> Tensor:
        """The table (V, H), decoded where it is read (``DecodedWeight``); gradients flow through it.

        Its shape, dtype and device decode nothing, ``weight[i]`` and ``F.embedding(ids, weight)`` those rows.
        It is not a parameter, and writing into it (``emb.weight.data[i] = x``) raises RuntimeError. While it
        is traced, it is the decoded table. While a tensor is missing or on the meta device, as during
        loading, it is an empty meta tensor.
        """
        tensors = self._stored()
        if any(tensor.is_meta for tensor in tensors.values()) or None in self._buffers.values():
            weight = torch.empty(self.shape, dtype=self.dtype, device="meta")
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            return weight
        rows, width = self.shape
        device = next(iter(tensors.values())).device
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self._rows(torch.arange(rows, device=device))
        return DecodedWeight(
            lambda ids, padding_idx: self._rows(ids, padding_idx=padding_idx),
            range(rows),
            width,
            dtype=self.dtype,
            device=device,
            requires_grad=torch.is_grad_enabled() and self._is_trained(),
            advice=f"{type(self).__name__} holds {_listed(self.tensor_names)}. {_ADVICE}",
            whole=True,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is decoded from {_listed(self.tensor_names)} "
                "and cannot be set; compress a dense table with embkern.compress, or assign those tensors"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = state_dict.pop(prefix + GUARD, None)
        if dense is not None and dense.shape != (0,):
            args[-1].append(
                f"{prefix}weight is a dense table, {type(self).__name__} holds {_listed(self.tensor_names)}: "
                "load it into the dense model and compress that"
            )
            return
        for name in self.code_names:  # With assign=True the tensor itself is taken.
            if isinstance(stored := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = stored.to(self.held_dtype(name, stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (adjustment := self.adjustment) is not None:
            own = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
            found = {name.partition(".")[0] for name in own}
            if ADJUSTMENT not in found and not found.isdisjoint(adjustment._parameters):
                adjustment.reset()  # a saved table includes the changes

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Apply ``fn`` as ``nn.Module`` does, so that modules keep sharing tensors.

        Buffers change in place. What cannot, from and to the meta device, is replaced by one tensor in all
        modules that share it.
        """
        held: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        before = [dict(tensors) for tensors in held]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensors, of_before in zip(held, before, strict=True):
            for name, old in of_before.items():
                new = tensors[name]
                if old is None or new is None or new is old:
                    continue
                if tensors is self._buffers and torch._has_compatible_shallow_copy_type(old, new):
                    old.data = new
                    tensors[name] = old
                else:
                    tensors[name] = _successor(old, new)
        return self


# What a tensor has been replaced by, for the modules that share it.
_SUCCESSORS: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


def _successor(old: Tensor, new: Tensor) -> Tensor:
    """Return what another module has already replaced ``old`` by, if it is like ``new``; else ``new``."""
    reference = _SUCCESSORS.get(old)
    known = None if reference is None else reference()
    if known is not None and (known.device, known.dtype, known.shape) == (new.device, new.dtype, new.shape):
        return known
    _SUCCESSORS[old] = weakref.ref(new)
    return new


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"
