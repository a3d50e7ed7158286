"""``DecodedWeight``: the ``weight`` of compressed embeddings and heads, which decodes what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

_T: Any = Tensor  # whose properties mypy takes for their values
_PROPERTIES = (
    "device dtype is_cpu is_cuda is_meta is_mps is_quantized is_sparse is_xpu itemsize layout nbytes "
)
_PROPERTIES += "ndim requires_grad shape"
_METHODS = "__len__ dim element_size get_device is_complex is_contiguous is_floating_point is_signed "
_METHODS += "ndimension nelement numel size stride"
_KNOWN: set[Any] = {  # without decoding a row
    *(getattr(_T, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(_T, name) for name in _METHODS.split()),
    *(torch.is_complex, torch.is_floating_point, torch.is_signed, torch.numel),
}
_DETACH: set[Any] = {_T.detach, torch.detach, _T.data.__get__}
_REQUIRE: set[Any] = {_T.requires_grad_, _T.requires_grad.__set__}
_WRITING_NAMES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_WRITING_NAMES |= {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}
_WRITING_NAMES |= {"__set__", "__setitem__"}  # a property, such as data

Decode: TypeAlias = Callable[[Tensor, int | None], Tensor]


class DecodedWeight(Tensor):
    """A table (V, H), or rows of it, that is decoded where its values are read.

    Shape, dtype, device and the like decode nothing. ``weight[i]`` and ``F.embedding(ids, weight)`` decode
    those rows alone; every other function gets the whole table as an ordinary tensor, through which gradients
    flow to the parameters. What it decodes are the values at that time, as of a parameter. It cannot be
    written: there are no values to change. Subscripts that are views of a tensor (integers and slices) return
    a ``DecodedWeight``, which cannot be written, either.
    """

    _decode: Decode
    _rows: range | int
    _whole: bool
    _advice: str
    _is_hf_initialized = True  # transformers initialises at random what does not say so

    def __new__(
        cls,
        decode: Decode,
        rows: range | int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
        advice: str,
        whole: bool = False,
    ) -> DecodedWeight:
        """Return the weight of rows.

        Args:
            decode: from ids of any shape and the id whose row gets no gradient, or None, to rows.
            rows: the ids of its rows, or a single one.
            width: H.
            dtype: of the decoded rows.
            device: of the table.
            requires_grad: whether gradients flow to a parameter.
            advice: what to do instead of writing, for the error.
            whole: whether these are all rows in order.
        """
        shape = (width,) if isinstance(rows, int) else (len(rows), width)
        self: DecodedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        self._decode, self._rows, self._whole, self._advice = decode, rows, whole, advice
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on the weight, or on the rows that it needs."""
        kwargs = kwargs or {}
        subject = next(iter((*args, *kwargs.values())), None)
        if isinstance(subject, DecodedWeight):
            if func in _KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _DETACH:
                return subject._of(subject._rows, detached=True)
            if func is Tensor.__getitem__:
                return subject._subscripted(args[1])
            if func == _T.grad.__get__:
                return None
            if func in _REQUIRE and subject.requires_grad == next(iter((*args[1:], *kwargs.values())), True):
                return subject
            if _is_write(func):
                raise subject._refusal()
        if isinstance(out := kwargs.get("out"), DecodedWeight):
            raise out._refusal()
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        args, kwargs = tree_map_only(DecodedWeight, DecodedWeight._decoded, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator of torch that was called below ``__torch_function__``."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, DecodedWeight) and argument.is_write:
                raise value._refusal()
        args, kwargs = tree_map_only(DecodedWeight, DecodedWeight._decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _decoded(self) -> Tensor:
        """Return the values as an ordinary tensor."""
        rows = self._rows
        if isinstance(rows, int):
            return self._decode(torch.tensor(rows, device=self.device), None)
        return self._decode(torch.arange(rows.start, rows.stop, rows.step, device=self.device), None)

    def _refusal(self) -> RuntimeError:
        return RuntimeError(f"weight: expected no write, as it is decoded where it is read; {self._advice}")

    def _of(self, rows: range | int, *, detached: bool = False) -> DecodedWeight:
        """Return the weight of some of the rows."""
        return DecodedWeight(
            _without_gradients(self._decode) if detached else self._decode,
            rows,
            self.shape[-1],
            dtype=self.dtype,
            device=self.device,
            requires_grad=self.requires_grad and not detached,
            advice=self._advice,
            whole=self._whole and rows == self._rows,
        )

    def _subscripted(self, index: Any) -> Tensor:
        """Return ``self[index]``: a view as ``DecodedWeight``, a copy as an ordinary tensor."""
        if isinstance(index, slice) and isinstance(self._rows, range) and (index.step or 1) > 0:
            return self._of(self._rows[index])
        if type(index) is int and isinstance(self._rows, range):
            return self._of(self._rows[index])
        if isinstance(index, list) and index and all(type(each) is int for each in index):
            index = torch.tensor(index)
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and self._whole:
            ids = index.to(self.device)
            return self._decode(torch.where(ids < 0, ids + len(self), ids), None)
        if isinstance(index, tuple) and index and type(index[0]) is int and isinstance(self._rows, range):
            return self._of(self._rows[index[0]])._decoded()[index[1:]]
        return self._decoded()[index]


def _is_write(func: Any) -> bool:
    """Return whether a function changes its first argument in place, as its name says."""
    name = getattr(func, "__name__", "")
    return name in _WRITING_NAMES or (name.endswith("_") and not name.endswith("__"))


def _without_gradients(decode: Decode) -> Decode:
    def decoded(ids: Tensor, padding_idx: int | None) -> Tensor:
        with torch.no_grad():
            return decode(ids, padding_idx)

    return decoded


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` of a ``DecodedWeight``, of which only the rows of the ids are decoded."""
    if not isinstance(weight, DecodedWeight):
        return F.embedding(
            input._decoded(), weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if max_norm is not None:  # it shortens rows in place
        raise weight._refusal()
    if not weight._whole or scale_grad_by_freq or sparse:
        return F.embedding(input, weight._decoded(), padding_idx, None, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is not None and not -len(weight) <= padding_idx < len(weight):
        raise AssertionError("Padding_idx must be within num_embeddings")
    return weight._decode(input, None if padding_idx is None else padding_idx % len(weight))
