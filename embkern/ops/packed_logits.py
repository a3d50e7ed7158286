"""packed_logits: the logits of a head tied to a packed table, ``hidden @ rows.T`` over all of its rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import BACKENDS, DECODE_STATES, DTYPES, Backend, regime_of, select, select_backward
from .first_edition import op_of
from .library import (
    apply,
    define,
    differentiable_once,
    is_exporting_to_onnx,
    needs_autograd,
    overload,
    raise_refusal,
    reraise_native,
)
from .packed_format import PackedTensors, check_packed
from .reference import sums_dtype

_PACKED_SCHEMA = (
    "Tensor records, Tensor directory, Tensor tiers, Tensor levels, Tensor scales, "
    "Tensor? basis, Tensor? offset"
)
Optional: TypeAlias = Tensor | None


def _forward_fake(hidden: Tensor, *packed: Any) -> Tensor:
    # A trace does not reach the checks of the native op.
    _check(hidden, PackedTensors(*packed))
    return hidden.new_empty(hidden.shape[0], packed[4].shape[0])


def _backward_fake(grad: Tensor, hidden: Tensor, *packed_and_needs: Any) -> tuple[Tensor, ...]:
    _, _, _, _, scales, basis, _offset, *needs = packed_and_needs
    dtype = sums_dtype(hidden, scales)
    width = hidden.shape[1]
    basis_rows = 0 if basis is None else basis.shape[0]
    shapes = (
        (hidden.shape[0] if needs[0] else 0, width),
        (scales.shape[0] if needs[1] else 0,),
        (basis_rows if needs[2] else 0, width),
        (width if needs[3] else 0,),
    )
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def by_pieces(definition: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the backends that decode pieces of the table, whose products are those of torch."""
    decode = overload("gather_decode_forward", "triton")
    return {"triton": functools.partial(definition, decode=decode), "torch": definition}


define(
    "packed_logits_forward",
    f"(Tensor hidden, {_PACKED_SCHEMA}) -> Tensor",
    backends=("native",),
    fake=_forward_fake,
    python=by_pieces(reference.packed_logits_forward),
    decomposition=reference.packed_logits_in_aten,
)
define(
    "packed_logits_backward",
    f"(Tensor grad, Tensor hidden, {_PACKED_SCHEMA}, bool needs_hidden, bool needs_scales, "
    "bool needs_basis, bool needs_offset) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=("native",),
    fake=_backward_fake,
    python=by_pieces(reference.packed_logits_backward),
)

_FORWARD: dict[str, Callable[..., Tensor]] = {
    backend: overload("packed_logits_forward", backend) for backend in BACKENDS
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    backend: overload("packed_logits_backward", backend) for backend in BACKENDS
}


class PackedLogits(Function):
    """Autograd of packed_logits: the codes are frozen, and the backward decodes the table again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        records: Tensor,
        directory: Tensor,
        tiers: Tensor,
        levels: Tensor,
        scales: Tensor,
        basis: Tensor | None,
        offset: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Run the backend's forward."""
        return _FORWARD[backend](hidden, records, directory, tiers, levels, scales, basis, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward reads."""
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of hidden, scales, basis and offset that are asked for."""
        hidden, *packed = ctx.saved_tensors
        floats = (hidden, *packed[4:])
        needs = [ctx.needs_input_grad[i] for i in (0, 5, 6, 7)]
        backend = select_backward("packed_logits", grad.device.type, packed[4].dtype, ctx.backend)
        with torch.no_grad():
            grads = _BACKWARD[backend](grad.contiguous(), hidden, *packed, *needs)
        wanted = [
            differentiable_once(found.to(each.dtype), grad, *floats) if needed else None
            for found, each, needed in zip(grads, floats, needs, strict=True)
        ]
        return wanted[0], None, None, None, None, *wanted[1:], None


def packed_logits(
    hidden: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Logits of a head that is tied to a packed table, of which no dense copy is made.

    ``F.linear(hidden, gather_decode(torch.arange(V), records, ..., offset, embedding_dim=H))``

    The native backend computes ``scales * (values @ (basis @ hidden)) + offset @ hidden`` instead: a row
    costs as many multiplications as it has coefficients, and its values never leave registers (up to 8
    hidden states) or the cache. Its sums run in fp32, or in float64 if hidden or scales are of float64. The
    others decode 16384 rows at a time, and multiply in the dtype of hidden.

    Gradients flow to hidden, scales, basis and offset, once (no double backward); the codes are frozen. Under
    autocast hidden is cast as ``F.linear`` casts it.

    Args:
        hidden: (``*``, H), of any floating-point dtype.
        records: (W,) int32, the codes of all rows; this and the others are those of ``gather_decode``.
        directory: (ceil(V / 32), 5) int32.
        tiers: (T, 1 + G) uint8.
        levels: (17, 16) int8.
        scales: (V,).
        basis: (K, H), or None.
        offset: (H,), or None.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        (``*``, V), in the dtype of hidden (under autocast, that of autocast).

    Raises:
        TypeError: a dtype is not one that ``gather_decode`` takes, or hidden is not floating point.
        ValueError: shapes or devices do not fit, or ``backend`` is unknown.
        RuntimeError: the backend asked for cannot serve this call.
    """
    on_cpu = scales.is_cpu
    device_type = "cpu" if on_cpu else scales.device.type
    regime = None if on_cpu else regime_of(math.prod(hidden.shape[:-1]), DECODE_STATES)
    chosen = select(op_of("packed_logits", levels), device_type, scales.dtype, backend, regime)
    if hidden.device != scales.device:
        raise ValueError(f"hidden: expected device {scales.device} as in scales, got {hidden.device}")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    packed: tuple[Optional, ...] = (records, directory, tiers, levels, scales, basis, offset)
    if (
        chosen != "native" or not on_cpu or hidden.dim() == 0
    ):  # The native CPU op checks its arguments itself.
        _check(hidden, PackedTensors(*packed))  # type: ignore[arg-type]
    flat = hidden.reshape(-1, hidden.shape[-1])
    if chosen == "native" and not on_cpu:
        flat, packed = flat.contiguous(), PackedTensors(*packed).contiguous()  # type: ignore[arg-type]
    try:
        if needs_autograd(hidden, scales, basis, offset):
            logits: Tensor = apply(PackedLogits, flat, *packed, chosen)
        else:
            forward = reference.packed_logits_in_aten if is_exporting_to_onnx() else _FORWARD[chosen]
            logits = forward(flat, *packed)
    except Exception as error:
        raise_refusal(_check, hidden, PackedTensors(*packed))  # type: ignore[arg-type]
        reraise_native(error)
        raise
    return logits.view(*hidden.shape[:-1], len(scales))


def _check(hidden: Tensor, packed: PackedTensors) -> None:
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if hidden.dim() == 0 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected shape (*, H) with H >= 1, got {tuple(hidden.shape)}")
    check_packed(packed, hidden.shape[-1])
