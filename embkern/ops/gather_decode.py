"""gather_decode: rows of a packed table, ``scale * (scales[ids] * row(records[ids]) + offset)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from . import reference
from .backends import BACKENDS, Backend, regime_of, select
from .first_edition import op_of
from .library import (
    apply,
    check_ids,
    define,
    differentiable_once,
    is_exporting,
    is_exporting_to_onnx,
    needs_autograd,
    overload,
    raise_refusal,
    reraise_native,
)
from .packed_format import PackedTensors, check_packed

_NO_PADDING = -1


def _forward_fake(
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    offset: Tensor | None,
    embedding_dim: int,
    scale: float,
) -> Tensor:
    # A trace does not reach the checks of the native op.
    _check(ids, PackedTensors(records, directory, tiers, levels, scales, basis, offset), embedding_dim)
    return scales.new_empty(*ids.shape, embedding_dim)


define(
    "gather_decode_forward",
    "(Tensor ids, Tensor records, Tensor directory, Tensor tiers, Tensor levels, Tensor scales, "
    "Tensor? basis, Tensor? offset, int embedding_dim, float scale) -> Tensor",
    backends=("native", "triton"),
    fake=_forward_fake,
    python={"torch": reference.gather_decode_forward},
    decomposition=reference.gather_decode_in_aten,
)

_FORWARD: dict[str, Callable[..., Tensor]] = {
    "native": overload("gather_decode_forward", "native"),
    "triton": overload("gather_decode_forward", "triton"),
    "torch": reference.gather_decode_forward,
}
_EXPORTED: dict[str, Callable[..., Tensor]] = {
    backend: overload("gather_decode_forward", backend) for backend in BACKENDS
}

# OpOverload.__call__ does nothing but call this, and takes 5 % of the lookup of a row; torch.compile knows
# the overload only.
_NATIVE: Callable[..., Tensor] = getattr(_FORWARD["native"], "_op", _FORWARD["native"])


class GatherDecode(Function):
    """Autograd of gather_decode: the codes are frozen, and the backward decodes the rows again."""

    @staticmethod
    def forward(
        ids: Tensor,
        records: Tensor,
        directory: Tensor,
        tiers: Tensor,
        levels: Tensor,
        scales: Tensor,
        basis: Tensor | None,
        offset: Tensor | None,
        embedding_dim: int,
        scale: float,
        padding_idx: int,
        backend: str,
    ) -> Tensor:
        """Run the backend's forward."""
        codes = (records, directory, tiers, levels)
        return _FORWARD[backend](ids, *codes, scales, basis, offset, embedding_dim, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the tensors that the backward reads."""
        *tensors, _offset, _, ctx.scale, ctx.padding_idx, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of scales, basis and offset that are needed."""
        ids, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:8]
        flat = grad.reshape(ids.numel(), grad.shape[-1])
        with torch.no_grad():
            grads = reference.gather_decode_backward(
                flat, ids, *tensors, ctx.scale, ctx.padding_idx, *needs, _FORWARD[ctx.backend]
            )
        wanted = [
            differentiable_once(each, grad, *tensors[4:]) if needed else None
            for each, needed in zip(grads, needs, strict=True)
        ]
        return None, None, None, None, None, *wanted, None, None, None, None


def gather_decode(
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    embedding_dim: int,
    scale: float = 1.0,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Look up rows of a packed table, whose rows are quantised at different rates.

    ``scale * (scales[ids] * rows + offset)`` where a row consists of the values of its codes, or is ``values
    @ basis`` if its tier holds coefficients of the basis. ``embkern.PackedTable`` describes the format.

    Sums run in fp32 (float64 for float64) and are rounded once; the result has the dtype of ``scales``. One
    exception: on CPUs that multiply bf16, coefficients of a bf16 table times their scale are rounded to bf16
    before the product, which takes 0.56 of the time; an element is then within ``2**-8 * (abs(row) +
    abs(scales[ids] * values) @ abs(basis))`` of the exact one, times ``scale``.
    Gradients flow to scales, basis and offset, once (no double backward); the codes are frozen.

    Args:
        ids: indices into the vocabulary, any shape (``*``), int32 or int64.
        records: (W,) int32, the codes of all rows, one row after the other.
        directory: (ceil(V / 32), 5) int32: where the records of 32 rows begin, and the tier of each row,
            four bits a row.
        tiers: (T, 1 + G) uint8, T up to 16: whether the values of a tier are coefficients of the basis, then
            the number of bits, 0 to 8, per value of each group of 32 values.
        levels: (17, 16) int8, in steps of 2^-5: tables whose entries are summed to the values of codes of 1
            to 4 bits (``embkern.ops.packed_codes``). Wider codes are uniform, ``code - (2**bits - 1) / 2``.
            With (4, 128) int16 or int32 the table is of the first edition, which only torch serves.
        scales: (V,), a factor on each row.
        basis: (K, H), K a multiple of 32; None if no tier needs it. Rows for groups of 0 bits may be left
            unread, or be multiplied by 0.
        offset: (H,), added to every row, or None.
        embedding_dim: H, the number of columns.
        scale: factor on the result, applied before the rounding.
        padding_idx: positions with this id contribute no gradient.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        (``*``, H), in the dtype of scales.

    Raises:
        IndexError: an id is negative or not below V (on CPU; on CUDA a device-side assertion).
        TypeError: a dtype is not the one above, or the floating-point dtypes differ.
        ValueError: shapes or devices do not fit, or ``backend`` is unknown.
        RuntimeError: the requested backend cannot serve this call.

    Source: the rates are allocated by reverse water-filling (Cover and Thomas, Elements of Information
    Theory, section 10.3) with rows as components.
    """
    if padding_idx is not None and scales.numel() and not -len(scales) <= padding_idx < len(scales):
        raise ValueError(f"padding_idx: expected an id below {len(scales)}, got {padding_idx}")
    packed = (records, directory, tiers, levels, scales, basis, offset)
    return decode_rows(ids, packed, embedding_dim, scale, padding_idx, backend, True)


# A PackedTensors, or the same without a name: making one takes 3 % of the lookup of a single row.
Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def decode_rows(
    ids: Tensor,
    packed: Tensors,
    embedding_dim: int,
    scale: float = 1.0,
    padding_idx: int | None = None,
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """``gather_decode``; without ``check``, of a table that was checked when it was made: only ids are."""
    scales, basis, offset = packed[4], packed[5], packed[6]
    on_cpu = scales.is_cpu
    device_type = "cpu" if on_cpu else scales.device.type  # is_cpu makes no torch.device
    regime = None if on_cpu else regime_of(ids.numel())
    chosen = select(op_of("gather_decode", packed[3]), device_type, scales.dtype, backend, regime)
    try:
        autograd = needs_autograd(scales, basis, offset)
        if chosen == "native" and on_cpu:  # The native CPU op checks its arguments itself, and takes strides.
            if not (autograd or is_compiling()):
                return _NATIVE(ids, *packed, embedding_dim, scale)
        else:
            if check:
                _check(ids, PackedTensors(*packed), embedding_dim)
            else:
                _check_ids(ids, scales)
            if chosen != "torch":
                ids, packed = ids.contiguous(), PackedTensors(*packed).contiguous()
        if autograd:
            padding = _NO_PADDING if padding_idx is None else padding_idx % len(scales)
            rows: Tensor = apply(GatherDecode, ids, *packed, embedding_dim, scale, padding, chosen)
            return rows
        if is_exporting_to_onnx():
            return reference.gather_decode_in_aten(ids, *packed, embedding_dim, scale)
        if is_exporting():  # A program has one node, for decompositions to take the place of.
            return _EXPORTED[chosen](ids, *packed, embedding_dim, scale)
        return _FORWARD[chosen](ids, *packed, embedding_dim, scale)
    except Exception as error:
        raise_refusal(_check, ids, PackedTensors(*packed), embedding_dim)
        raise_refusal(check_ids, ids, len(scales))
        reraise_native(error)
        raise


def _check(ids: Tensor, packed: PackedTensors, embedding_dim: int) -> None:
    _check_ids(ids, packed.scales)
    check_packed(packed, embedding_dim)
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")


def _check_ids(ids: Tensor, scales: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected dtype torch.int32 or torch.int64, got {ids.dtype}")
    if ids.device != scales.device:
        raise ValueError(f"ids: expected device {scales.device} as in scales, got {ids.device}")
