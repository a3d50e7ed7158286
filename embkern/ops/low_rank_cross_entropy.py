"""low_rank_cross_entropy: the loss of a head tied to factors, without its (N, V) logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, select
from .cross_entropy import Reduction, as_cap, check_arguments, check_options, reduced
from .library import apply, define, differentiable_once, needs_autograd, overload
from .reference import accumulation_dtype
from .reference.cross_entropy import STATISTICS


def _forward_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    states, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    return hidden.new_empty(states, dtype=dtype), hidden.new_empty(states, STATISTICS, dtype=dtype)


def _backward_fake(grad: Tensor, statistics: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, codes, *_, needs_codes, needs_bias = rest
    return (
        statistics.new_empty(statistics.shape[0], codes.shape[1]),
        statistics.new_empty(statistics.shape[0]),
        codes.new_empty(codes.shape if needs_codes else (0,)),
        statistics.new_empty(codes.shape[0] if needs_bias else 0),
    )


_ARGUMENTS = (
    "Tensor hidden, Tensor labels, Tensor codes, Tensor basis, Tensor? offset, Tensor? bias, "
    "int ignore_index, float label_smoothing, float softcap"
)
define(
    "low_rank_cross_entropy_forward",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    backends=("triton",),
    fake=_forward_fake,
)
define(
    "low_rank_cross_entropy_backward",
    f"(Tensor grad, Tensor statistics, {_ARGUMENTS}, bool needs_codes, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    backends=("triton",),
    fake=_backward_fake,
)
_TRITON_FORWARD: Callable[..., tuple[Tensor, Tensor]] = overload("low_rank_cross_entropy_forward", "triton")
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "triton": overload("low_rank_cross_entropy_backward", "triton"),
    "torch": reference.low_rank_cross_entropy_backward,
}


def _forward(backend: str, *arguments: Any, frozen: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and, if frozen, what the definition returns beside them; else empty tensors."""
    if backend == "torch":
        return reference.low_rank_cross_entropy_forward(*arguments, frozen)
    losses, statistics = _TRITON_FORWARD(*arguments)
    return losses, statistics, losses.new_empty(0), losses.new_empty(0)


class LowRankCrossEntropy(Function):
    """Autograd of low_rank_cross_entropy: losses, and what the backward reads.

    With ``frozen`` the forward computes the gradient of ``hidden @ basis.T`` with the losses, and the
    backward scales it. Otherwise the backward computes the logits again.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        labels: Tensor,
        codes: Tensor,
        basis: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        options: tuple[int, float, float],
        frozen: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the backend's forward."""
        return _forward(backend, hidden, labels, codes, basis, offset, bias, *options, frozen=frozen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward reads."""
        *tensors, ctx.options, ctx.frozen, ctx.backend = inputs
        _, statistics, *sums = output
        ctx.mark_non_differentiable(statistics, *sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(sums if ctx.frozen else [statistics, statistics]), *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """Return the gradients of hidden, codes, basis, offset and bias that are needed."""
        if grad is None:
            return (None,) * 9
        first, second, hidden, labels, codes, basis, offset, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_codes = of_bias = None
        with torch.no_grad():
            if ctx.frozen:
                of_projected, of_constant = first * grad.to(first.dtype).unsqueeze(1), second * grad
            else:
                of_projected, of_constant, of_codes, of_bias = _BACKWARD[ctx.backend](
                    grad, first, hidden, labels, codes, basis, offset, bias, *ctx.options, needs[2], needs[5]
                )
            of_hidden, of_basis, of_offset = reference.low_rank_gradients(
                of_projected, of_constant, hidden, basis, offset, (needs[0], needs[3], needs[4])
            )
        floats = (hidden, codes, basis, offset, bias)
        found: tuple[Any, ...] = (of_hidden, of_codes, of_basis, of_offset, of_bias)
        wanted = [
            differentiable_once(each.to(tensor.dtype), grad, *floats) if needed else None
            for each, tensor, needed in zip(found, floats, (needs[0], *needs[2:6]), strict=True)
        ]
        return wanted[0], None, *wanted[1:], None, None, None


def low_rank_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of a head that is tied to factors; neither its logits nor a dense table are held.

    ``F.cross_entropy(capped(F.linear(hidden, codes @ basis + offset, bias)), labels, ignore_index=...,
    label_smoothing=..., reduction=...)`` with ``capped(z) = softcap * tanh(z / softcap)``

    ``hidden @ basis.T`` meets the codes a piece at a time, and the logits are folded into the maximum and the
    sum of exponentials of each hidden state. In Triton's kernels logits stay in registers, and so do their
    gradients for 16-bit hidden states and r of up to 256; all else, and plain torch, has no more than 16
    million of them (2 million on CPU) in memory unless that were fewer than 256 rows. Sums run in fp32
    (float64 for float64); products run in the dtype of hidden, those of plain torch on CPU in that of sums.
    Loss and gradient of a prediction that is nearly certain are computed without cancellation.

    Gradients flow to hidden, codes, basis, offset and bias, once (no double backward). In plain torch, if
    codes and bias are frozen, and without label smoothing, they are computed with the loss; otherwise the
    backward computes the logits again. Under autocast hidden is cast as ``F.linear`` casts it.

    Args:
        hidden: (``*``, H), of any floating-point dtype.
        labels: (``*``), int32 or int64, below V or ``ignore_index``.
        codes: (V, r).
        basis: (r, H).
        offset: (H,), or None.
        bias: (V,), added to the logits, or None.
        ignore_index: label of states that count neither for the loss nor for gradients.
        label_smoothing: 0 to 1, the share of the uniform distribution in the target.
        softcap: the bound of the logits, or None.
        reduction: ``mean`` over the states that are not ignored, ``sum`` or ``none``.
        backend: ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        A scalar, or (``*``) for ``none``: float32 (float64 for float64 hidden). The mean is NaN if all states
        are ignored, as in torch.

    Raises:
        IndexError: a label is out of range (on CPU; on CUDA a device-side assertion).
        TypeError: a dtype is not supported, or the factors' dtypes differ.
        ValueError: shapes, devices or options do not fit, or ``backend`` is unknown.
        RuntimeError: the backend asked for cannot serve this call.

    Source: the loss without logits is that of arXiv 2411.09009.
    """
    check_options(label_smoothing, softcap, reduction)
    chosen = select("low_rank_cross_entropy", codes.device.type, codes.dtype, backend)
    _check_factors(hidden, codes, basis, offset)
    check_arguments(hidden, labels, bias, len(codes), ignore_index)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    options = (ignore_index, float(label_smoothing), as_cap(softcap))
    tensors = (hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), codes, basis, offset, bias)
    if needs_autograd(hidden, codes, basis, offset, bias):
        frozen = chosen == "torch" and not label_smoothing and not needs_autograd(codes, bias)
        losses: Tensor = apply(LowRankCrossEntropy, *tensors, options, frozen, chosen)[0]
    else:
        losses = _forward(chosen, *tensors, *options, frozen=False)[0]
    return reduced(losses, labels, ignore_index, reduction)


def _check_factors(hidden: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None) -> None:
    if codes.dim() != 2 or codes.shape[0] == 0:
        raise ValueError(f"codes: expected shape (V, r) with V >= 1, got {tuple(codes.shape)}")
    width = hidden.shape[-1] if hidden.dim() else 0
    if tuple(basis.shape) != (codes.shape[1], width):
        raise ValueError(f"basis: expected shape {(codes.shape[1], width)}, got {tuple(basis.shape)}")
    if offset is not None and tuple(offset.shape) != (width,):
        raise ValueError(f"offset: expected shape ({width},), got {tuple(offset.shape)}")
    for name, tensor in (("basis", basis), ("offset", offset)):
        if tensor is not None and tensor.dtype != codes.dtype:
            raise TypeError(f"{name}: expected dtype {codes.dtype} as in codes, got {tensor.dtype}")
    for name, tensor in (("hidden", hidden), ("basis", basis), ("offset", offset)):
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(f"{name}: expected device {codes.device} as in codes, got {tensor.device}")
