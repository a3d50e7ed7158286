"""cosine_mse_loss: the direction-aware reconstruction loss, cosine distance plus mean squared error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, select
from .library import define, differentiable_once, needs_autograd, overload


def _forward_fake(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(output.dtype)
    return output.new_empty((), dtype=dtype), output.new_empty((output.shape[0], 3), dtype=dtype)


def _backward_fake(grad_loss: Tensor, output: Tensor, *_: object) -> Tensor:
    return torch.empty_like(output)


define(
    "cosine_mse_forward",
    "(Tensor output, Tensor target, Tensor? row_weight, float cosine_weight, float mse_weight, float eps)"
    " -> (Tensor, Tensor)",
    backends=("native",),
    fake=_forward_fake,
)
define(
    "cosine_mse_backward",
    "(Tensor grad_loss, Tensor output, Tensor target, Tensor? row_weight, Tensor stats, "
    "float cosine_weight, float mse_weight, float eps) -> Tensor",
    backends=("native",),
    fake=_backward_fake,
)

_FORWARD: dict[str, Callable] = {
    "native": overload("cosine_mse_forward", "native"),
    "torch": reference.cosine_mse_forward,
}
_BACKWARD: dict[str, Callable] = {
    "native": overload("cosine_mse_backward", "native"),
    "torch": reference.cosine_mse_backward,
}


class CosineMSE(Function):
    """Autograd of cosine_mse_loss; the backend of the forward also runs the backward."""

    @staticmethod
    def forward(
        output: Tensor,
        target: Tensor,
        row_weight: Tensor | None,
        cosine_weight: float,
        mse_weight: float,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Run the backend's forward on (N, H) validated arguments; return the loss and its statistics."""
        return _FORWARD[backend](output, target, row_weight, cosine_weight, mse_weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward reads."""
        rows, target, row_weight, *ctx.scalars, ctx.backend = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(rows, target, row_weight, stats)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple:
        """Return the gradients of output and target; the loss is symmetric, so one kernel serves both."""
        output, target, row_weight, stats = ctx.saved_tensors
        backward = _BACKWARD[ctx.backend]
        grad_output = grad_target = None
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                grad_output = backward(grad_loss, output, target, row_weight, stats, *ctx.scalars)
            if ctx.needs_input_grad[1]:
                swapped = stats[:, [0, 2, 1]].contiguous()
                grad_target = backward(grad_loss, target, output, row_weight, swapped, *ctx.scalars)
        grads = [
            None if grad is None else differentiable_once(grad, grad_loss, output, target)
            for grad in (grad_output, grad_target)
        ]
        return *grads, None, None, None, None, None


def cosine_mse_loss(
    output: Tensor,
    target: Tensor,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 1.0,
    row_weight: Tensor | None = None,
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """Cosine distance plus mean squared error, averaged over rows.

    ``cosine_weight * (1 - cos).mean() + mse_weight * F.mse_loss(output, target)`` with
    ``cos = (output * target).sum(-1) / (output.norm(dim=-1) * target.norm(dim=-1)).clamp_min(eps)``

    With ``row_weight`` both means are weighted: ``(row_weight * per_row).sum() / row_weight.sum()``.
    A row of zeros has cosine 0, so it costs ``cosine_weight``. Gradients flow to output and target, once
    (no double backward). Sums run in fp32 (float64 for float64).

    Args:
        output: (``*``, H), the reconstruction.
        target: (``*``, H), what it should be. Where the dtypes differ (as under autocast), both are
            promoted to the wider one.
        cosine_weight: weight of the cosine distance.
        mse_weight: weight of the squared error.
        row_weight: (``*``), non-negative with a positive sum; takes no gradient.
        eps: lower bound of the product of the two norms. A row of zeros beside one that is not has a
            gradient of the order of 1/eps: below about 1e-4 that is infinite in float16.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        A scalar, float32 (float64 for float64 input). NaN if there are no rows, like ``F.mse_loss``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices do not fit, ``row_weight`` requires a gradient, ``eps`` is not a
            positive normal number of the accumulation dtype, or ``backend`` is unknown.
        RuntimeError: the backend asked for cannot serve this call.

    Source: arXiv 2106.08181, section 3 (the loss that weighs direction); its authors' eps is 1e-6.
    """
    _check(output, target, row_weight, eps)
    width = output.shape[-1]
    if output.dtype != target.dtype:
        dtype = torch.promote_types(output.dtype, target.dtype)
        output, target = output.to(dtype), target.to(dtype)
    chosen = select("cosine_mse", output.device.type, output.dtype, backend)
    output, target = output.reshape(-1, width).contiguous(), target.reshape(-1, width).contiguous()
    if row_weight is not None:
        row_weight = row_weight.reshape(-1).to(reference.accumulation_dtype(output.dtype)).contiguous()
    arguments = (output, target, row_weight, float(cosine_weight), float(mse_weight), float(eps))
    if needs_autograd(output, target):
        loss, _ = CosineMSE.apply(*arguments, chosen)
    else:
        loss, _ = _FORWARD[chosen](*arguments)
    return loss


def _check(output: Tensor, target: Tensor, row_weight: Tensor | None, eps: float) -> None:
    if output.dim() == 0 or output.shape[-1] == 0 or output.shape != target.shape:
        raise ValueError(
            "output, target: expected equal shapes (*, H) with H >= 1, "
            f"got {tuple(output.shape)} and {tuple(target.shape)}"
        )
    for name, tensor in (("output", output), ("target", target)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    if target.device != output.device:
        raise ValueError(f"target: expected device {output.device} as in output, got {target.device}")
    if row_weight is not None:
        if row_weight.shape != output.shape[:-1]:
            raise ValueError(
                f"row_weight: expected shape {tuple(output.shape[:-1])}, got {tuple(row_weight.shape)}"
            )
        if row_weight.device != output.device:
            raise ValueError(
                f"row_weight: expected device {output.device} as in output, got {row_weight.device}"
            )
        if row_weight.requires_grad:
            raise ValueError("row_weight: expected a tensor without gradient, got one that requires it")
    smallest = torch.finfo(reference.accumulation_dtype(output.dtype)).tiny
    if not eps >= smallest:
        raise ValueError(f"eps: expected at least {smallest:.3g}, got {eps}")
