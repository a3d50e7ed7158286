"""cosine_mse_loss: the direction-aware reconstruction loss of arXiv 2106.08181, in four terms.

The gradient is computed with the loss, while a row is in registers or L1: output and target are read once,
the gradient is written once, and a backward whose incoming gradient is 1 accesses none of them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, select
from .library import apply, define, needs_autograd, overload, second_derivative_refused
from .scale_gradient import scaled_gradient

Reduction = Literal["mean", "sum", "none"]


def _forward_fake(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_output: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (output.shape[0],) if reduction == reference.NONE else ()
    return (
        output.new_empty(shape, dtype=reference.accumulation_dtype(output.dtype)),
        output.new_empty(output.shape if needs_output else (0,)),
        output.new_empty(output.shape if needs_target else (0,)),
    )


define(
    "cosine_mse_forward",
    "(Tensor output, Tensor target, Tensor? row_weight, Tensor? target_norm, Tensor? grad_loss, "
    "int reduction, float cosine_weight, float mse_weight, float rmse_weight, float power_weight, "
    "float alpha, float eps, bool needs_output, bool needs_target) -> (Tensor, Tensor, Tensor)",
    backends=("native", "triton"),
    fake=_forward_fake,
)

_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "native": overload("cosine_mse_forward", "native"),
    "triton": overload("cosine_mse_forward", "triton"),
    "torch": reference.cosine_mse_forward,
}


class CosineMSE(Function):
    """Autograd of cosine_mse_loss: the forward returns the gradients with the loss, the backward scales them.

    In fp16 the gradient of the mean would underflow before a loss scale is applied to it. There the backward
    runs the kernel again with the incoming gradient.
    """

    @staticmethod
    def forward(
        output: Tensor,
        target: Tensor,
        row_weight: Tensor | None,
        target_norm: Tensor | None,
        options: tuple[Any, ...],
        needs: tuple[bool, bool],
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backend's forward on validated (N, H) arguments and return the loss and its gradients."""
        now = (False, False) if output.dtype == torch.float16 else needs
        return _FORWARD[backend](output, target, row_weight, target_norm, None, *options, *now)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the gradients or, in fp16, the inputs that they are computed from."""
        rows, target, row_weight, target_norm, ctx.options, ctx.needs, ctx.backend = inputs
        ctx.deferred = rows.dtype == torch.float16
        ctx.set_materialize_grads(False)
        if ctx.deferred:
            ctx.save_for_backward(rows, target, row_weight, target_norm)
        else:
            ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *second: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of output and target."""
        # A compiled graph passes a tangent for every output and refuses second derivatives itself.
        if not torch.compiler.is_compiling() and any(each is not None for each in second):
            raise second_derivative_refused()
        nothing = (None,) * 5
        if grad_loss is None:
            return None, None, *nothing
        if ctx.deferred:
            grad_loss = grad_loss.contiguous()  # The incoming gradient of a sum is one number, expanded.
            grads = apply(
                _DeferredGradients, grad_loss, *ctx.saved_tensors, ctx.options, ctx.needs, ctx.backend
            )
        else:
            grads = [
                scaled_gradient(each, grad_loss) if needed else None
                for each, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
            ]
        return *(each if needed else None for each, needed in zip(grads, ctx.needs, strict=True)), *nothing


class _DeferredGradients(Function):
    """The gradients of CosineMSE, computed from its inputs and the incoming gradient; not differentiable."""

    @staticmethod
    def forward(
        grad_loss: Tensor,
        output: Tensor,
        target: Tensor,
        row_weight: Tensor | None,
        target_norm: Tensor | None,
        options: tuple[Any, ...],
        needs: tuple[bool, bool],
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        grads = _FORWARD[backend](output, target, row_weight, target_norm, grad_loss, *options, *needs)[1:]
        return grads[0], grads[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise second_derivative_refused()


def cosine_mse_loss(
    output: Tensor,
    target: Tensor,
    *,
    cosine_weight: float = 1.0,
    mse_weight: float = 1.0,
    rmse_weight: float = 0.0,
    power_weight: float = 0.0,
    alpha: float = 1.0,
    row_weight: Tensor | None = None,
    target_norm: Tensor | None = None,
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """Compute cosine distance, mean squared error, its root, and a power of the absolute error, weighted.

    ``(w * rows).sum() / w.sum() + rmse_weight * ((w * mse).sum() / w.sum()).sqrt()`` with ``w = row_weight``
    (ones by default), ``e = output - target`` and, per row::

        mse  = e.square().mean(-1)
        cos  = (output * target).sum(-1) / (output.norm(dim=-1) * target.norm(dim=-1)).clamp_min(eps)
        rows = cosine_weight * (1 - cos) + mse_weight * mse
               + power_weight * (e.abs() + 1e-10).pow(alpha).mean(-1)

    ``reduction="none"`` returns ``w * (rows + rmse_weight * mse.sqrt())``, ``"sum"`` its sum. Only the mean
    takes one root for the whole batch, as the authors' code does.

    A row of zeros has cosine 0, so that its distance is 1. The gradient of a root or an absolute value at 0
    is 0. Gradients flow to output and target, once (no double backward). Sums run in fp32 (float64 for
    float64); where the squares of a row would leave the range of fp32 (norms of 1e-20 or 1e20), the row is
    summed in a wider range. A NaN stays in the gradient of its row unless there is a root of the batch.

    There is one pass over output and target. ``rmse_weight`` with the mean needs a second one, because the
    gradient depends on the sum over the batch.

    Args:
        output: (``*``, H), the reconstruction.
        target: (``*``, H), what it should be. Where the dtypes differ (as under autocast), both are
            promoted to the wider one.
        cosine_weight: weight of the cosine distance.
        mse_weight: weight of the squared error.
        rmse_weight: weight of the root of the mean squared error.
        power_weight: weight of the power of the absolute error.
        alpha: exponent of that power, above 0.
        row_weight: (``*``), weights of the rows, non-negative with a positive sum; without gradient.
        target_norm: (``*``), ``target.norm(dim=-1)`` in the accumulation dtype, where it is known, as for a
            constant table. Target then takes no gradient.
        reduction: ``mean``, ``sum`` or ``none``.
        eps: lower bound of the product of the two norms. A row of zeros beside one that is not has a
            gradient of the order of 1/eps: below about 1e-4 that is infinite in float16.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        A scalar, or (``*``) for ``none``: float32 (float64 for float64 input). The mean is NaN if there are
        no rows, like ``F.mse_loss``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices do not fit, ``row_weight`` or ``target_norm`` requires a gradient,
            ``eps`` is not a positive normal number of the accumulation dtype, ``alpha`` is not positive, or
            ``reduction`` or ``backend`` is unknown.
        RuntimeError: the requested backend cannot serve this call.

    Source: arXiv 2106.08181, section 3 (the loss that weighs direction), and the training code that its
    authors released (root and power terms; eps 1e-6).
    """
    check_loss_arguments(output, target, row_weight, target_norm, reduction, alpha, eps)
    width, shape = output.shape[-1], output.shape[:-1]
    if output.dtype != target.dtype:
        dtype = torch.promote_types(output.dtype, target.dtype)
        output, target = output.to(dtype), target.to(dtype)
    chosen = select("cosine_mse", output.device.type, output.dtype, backend)
    if output.dim() != 2:  # A view is a node of the graph, which costs the backward 5 us.
        output, target = output.reshape(-1, width), target.reshape(-1, width)
    output, target = output.contiguous(), target.contiguous()
    accumulation = reference.accumulation_dtype(output.dtype)
    if row_weight is not None:
        row_weight = row_weight.reshape(-1).to(accumulation).contiguous()
    if target_norm is not None:
        target_norm = target_norm.reshape(-1).to(accumulation).contiguous()
    weights = (float(cosine_weight), float(mse_weight), float(rmse_weight), float(power_weight))
    options = (reference.REDUCTIONS.index(reduction), *weights, float(alpha), float(eps))
    if needs_autograd(output, target):
        needs = (output.requires_grad, target.requires_grad)
        loss: Tensor = apply(CosineMSE, output, target, row_weight, target_norm, options, needs, chosen)[0]
    else:
        loss = _FORWARD[chosen](output, target, row_weight, target_norm, None, *options, False, False)[0]
    return loss.view(shape) if reduction == "none" else loss


def check_loss_arguments(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    reduction: str,
    alpha: float,
    eps: float,
) -> None:
    """Raise the errors that ``cosine_mse_loss`` documents."""
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
    check_row_values("row_weight", row_weight, output)
    check_row_values("target_norm", target_norm, output)
    if target_norm is not None and target.requires_grad:
        raise ValueError("target_norm: expected None where target requires a gradient")
    check_loss_options(reduction, alpha, eps, output.dtype)


def check_row_values(name: str, values: Tensor | None, rows: Tensor) -> None:
    """Check an optional tensor with one value for each of ``rows`` (*, H)."""
    if values is None:
        return
    if values.shape != rows.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(rows.shape[:-1])}, got {tuple(values.shape)}")
    if values.is_complex():
        raise TypeError(f"{name}: expected a real dtype, got {values.dtype}")
    if values.device != rows.device:
        raise ValueError(f"{name}: expected device {rows.device} as the rows', got {values.device}")
    if values.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")


def check_loss_options(reduction: str, alpha: float, eps: float, dtype: torch.dtype) -> None:
    """Check the scalars of the loss."""
    if reduction not in reference.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(reference.REDUCTIONS)}, got {reduction!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a positive number, got {alpha}")
    smallest = torch.finfo(reference.accumulation_dtype(dtype)).tiny
    if not eps >= smallest:
        raise ValueError(f"eps: expected at least {smallest:.3g}, got {eps}")
