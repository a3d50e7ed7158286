"""packed_cross_entropy: the loss of a head tied to a packed table, without its (N, V) logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import BACKENDS, Backend, select
from .cross_entropy import Reduction, as_cap, check_arguments, check_options, reduced
from .first_edition import op_of
from .library import (
    apply,
    define,
    differentiable_once,
    needs_autograd,
    overload,
    raise_refusal,
    reraise_native,
)
from .packed_format import PackedTensors, check_packed
from .packed_logits import _PACKED_SCHEMA, Optional
from .reference import sums_dtype
from .reference.cross_entropy import STATISTICS

_FLOATS = (0, 6, 7, 8, 9)  # Positions of hidden, scales, basis, offset and bias.


def _forward_fake(hidden: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *packed, bias, ignore_index, _smoothing, _softcap, needs_hidden = rest
    _check(hidden, labels, PackedTensors(*packed), bias, ignore_index)
    states, width = hidden.shape
    shapes = ((states,), (states, STATISTICS), (states if needs_hidden else 0, width))
    losses, statistics, of_hidden = (
        hidden.new_empty(shape, dtype=sums_dtype(hidden, packed[4])) for shape in shapes
    )
    return losses, statistics, of_hidden


def _backward_fake(grad: Tensor, statistics: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, _, scales, basis, _offset, _bias, _, _, _, *needs = rest
    width = hidden.shape[1]
    shapes = (
        (hidden.shape[0] if needs[0] else 0, width),
        (scales.shape[0] if needs[1] else 0,),
        ((0 if basis is None else basis.shape[0]) if needs[2] else 0, width),
        (width if needs[3] else 0,),
        (scales.shape[0] if needs[4] else 0,),
    )
    return tuple(hidden.new_empty(shape, dtype=sums_dtype(hidden, scales)) for shape in shapes)


_ARGUMENTS = f"Tensor hidden, Tensor labels, {_PACKED_SCHEMA}, Tensor? bias, int ignore_index, "
_ARGUMENTS += "float label_smoothing, float softcap"
define(
    "packed_cross_entropy_forward",
    f"({_ARGUMENTS}, bool needs_hidden) -> (Tensor, Tensor, Tensor)",
    backends=("native", "triton"),
    fake=_forward_fake,
    python={"torch": reference.packed_cross_entropy_forward},
)
define(
    "packed_cross_entropy_backward",
    f"(Tensor grad, Tensor statistics, {_ARGUMENTS}, bool needs_hidden, bool needs_scales, bool needs_basis, "
    "bool needs_offset, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=("native", "triton"),
    fake=_backward_fake,
    python={"torch": reference.packed_cross_entropy_backward},
)

_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    backend: overload("packed_cross_entropy_forward", backend) for backend in BACKENDS
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    backend: overload("packed_cross_entropy_backward", backend) for backend in BACKENDS
}


class PackedCrossEntropy(Function):
    """Autograd of packed_cross_entropy: losses, statistics for the backward, the unit gradient of hidden.

    With ``only_hidden`` the forward computes the gradient of hidden with the losses, in one pass over the
    table, and the backward scales it. Otherwise the backward computes the logits again.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        labels: Tensor,
        records: Tensor,
        directory: Tensor,
        tiers: Tensor,
        levels: Tensor,
        scales: Tensor,
        basis: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        options: tuple[int, float, float],
        only_hidden: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend's forward."""
        tensors = (hidden, labels, records, directory, tiers, levels, scales, basis, offset, bias)
        return _FORWARD[backend](*tensors, *options, only_hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what the backward reads."""
        *tensors, ctx.options, ctx.only_hidden, ctx.backend = inputs
        _, statistics, of_hidden = output
        ctx.mark_non_differentiable(statistics, of_hidden)
        ctx.set_materialize_grads(False)
        if ctx.only_hidden:
            ctx.save_for_backward(of_hidden, *(tensors[i] for i in _FLOATS))
        else:
            ctx.save_for_backward(statistics, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """Return the gradients of hidden, scales, basis, offset and bias that are needed."""
        if grad is None:
            return (None,) * 13
        known, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in _FLOATS]
        grads: tuple[Any, ...]
        with torch.no_grad():
            if ctx.only_hidden:
                floats, grads = tensors, (known * grad.unsqueeze(1).to(known.dtype), *(None,) * 4)
            else:
                floats = [tensors[i] for i in _FLOATS]
                grads = _BACKWARD[ctx.backend](grad.contiguous(), known, *tensors, *ctx.options, *needs)
        wanted = [
            differentiable_once(found.to(each.dtype), grad, *floats) if needed else None
            for found, each, needed in zip(grads, floats, needs, strict=True)
        ]
        return wanted[0], *(None,) * 5, *wanted[1:], None, None, None


def packed_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of a head that is tied to a packed table; neither its logits nor a dense table are held.

    ``F.cross_entropy(capped(packed_logits(hidden, records, ..., offset) + bias), labels, ignore_index=...,
    label_smoothing=..., reduction=...)`` with ``capped(z) = softcap * tanh(z / softcap)``

    Logits are computed a block of rows at a time and folded into the maximum and the sum of exponentials of
    each hidden state. Sums run in fp32, or in float64 if hidden or scales are of float64. Loss and gradient
    of a prediction that is nearly certain are computed without cancellation. The native backend drops ignored
    states at once, and its bits do not depend on the number of threads. In Triton's kernels the logits of
    decoded rows stay in registers; their gradients are in memory a piece at a time.

    Gradients flow to hidden, scales, basis, offset and bias, once (no double backward); the codes are frozen.
    If only hidden needs one, and without label smoothing, the native backend and plain torch compute it with
    the loss, in one pass. Otherwise the backward computes the logits again. Under autocast hidden is cast as
    ``F.linear`` casts it.

    Args:
        hidden: (``*``, H), of any floating-point dtype.
        labels: (``*``), int32 or int64, below V or ``ignore_index``.
        records: (W,) int32, the codes of all rows; this and the others are those of ``gather_decode``.
        directory: (ceil(V / 32), 5) int32.
        tiers: (T, 1 + G) uint8.
        levels: (17, 16) int8.
        scales: (V,).
        basis: (K, H), or None.
        offset: (H,), or None.
        bias: (V,), added to the logits, or None.
        ignore_index: label of states that count neither for the loss nor for gradients.
        label_smoothing: 0 to 1, the share of the uniform distribution in the target.
        softcap: the bound of the logits, or None.
        reduction: ``mean`` over the states that are not ignored, ``sum`` or ``none``.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        A scalar, or (``*``) for ``none``: float32 (float64 if hidden or scales are). The mean is NaN if all
        states are ignored, as in torch.

    Raises:
        IndexError: a label is out of range (on CPU; on CUDA a device-side assertion).
        TypeError: a dtype is not one that ``gather_decode`` takes, or hidden is not floating point.
        ValueError: shapes, devices or options do not fit, or ``backend`` is unknown.
        RuntimeError: the backend asked for cannot serve this call.

    Source: the loss without logits is that of arXiv 2411.09009; here the rows are decoded on the way.
    """
    check_options(label_smoothing, softcap, reduction)
    device_type = "cpu" if scales.is_cpu else scales.device.type
    chosen = select(op_of("packed_cross_entropy", levels), device_type, scales.dtype, backend)
    if hidden.device != scales.device:
        raise ValueError(f"hidden: expected device {scales.device} as in scales, got {hidden.device}")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    packed: tuple[Optional, ...] = (records, directory, tiers, levels, scales, basis, offset)
    if chosen != "native" or hidden.dim() != 2 or labels.dim() != 1:  # The native op checks its arguments.
        _check(hidden, labels, PackedTensors(*packed), bias, ignore_index)  # type: ignore[arg-type]
    options = (ignore_index, float(label_smoothing), as_cap(softcap))
    tensors = (hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), *packed, bias)
    try:
        if needs_autograd(hidden, scales, basis, offset, bias):
            frozen = not needs_autograd(scales, basis, offset, bias)
            only_hidden = chosen != "triton" and not label_smoothing and frozen
            losses: Tensor = apply(PackedCrossEntropy, *tensors, options, only_hidden, chosen)[0]
        else:
            losses = _FORWARD[chosen](*tensors, *options, False)[0]
    except Exception as error:
        raise_refusal(_check, hidden, labels, PackedTensors(*packed), bias, ignore_index)  # type: ignore[arg-type]
        reraise_native(error)
        raise
    return reduced(losses, labels, ignore_index, reduction)


def _check(
    hidden: Tensor, labels: Tensor, packed: PackedTensors, bias: Tensor | None, ignore_index: int
) -> None:
    check_packed(packed, hidden.shape[-1] if hidden.dim() else 0)
    check_arguments(hidden, labels, bias, len(packed.scales), ignore_index)
