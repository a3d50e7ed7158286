"""Definition of cosine_mse_loss and its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .numerics import accumulation_dtype

# The values of `reduction` of the raw ops, in the order of torch's enumeration.
REDUCTIONS = ("none", "mean", "sum")
NONE, MEAN, SUM = range(3)
# Outside these bounds, squares of an fp32 row may leave the range: the row is divided by its largest entry.
_LARGE, _SMALL = 1e10, 1e-10
POWER_BIAS = 1e-10  # The authors' |x - y| + 1e-10, which keeps the gradient of the power term finite.


def cosine_mse_forward(
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
    """Loss, and the gradients of output and target; one that is not needed is an empty tensor.

    output and target (N, H); row_weight and target_norm (N,) or None; grad_loss of the shape of the loss, or
    None for ones. The loss is (N,) for reduction none, else a scalar. A term of weight 0 is not computed.
    """
    dtype = accumulation_dtype(output.dtype)
    count, width = output.shape
    y, x = output.to(dtype), target.to(dtype)
    e = y - x
    (y, y_scale), (x, x_scale), (e_scaled, e_scale) = _scaled_rows(y), _scaled_rows(x), _scaled_rows(e)
    y_norm = torch.linalg.vector_norm(y, dim=1)
    x_norm = torch.linalg.vector_norm(x, dim=1) if target_norm is None else target_norm / x_scale
    both_scales = y_scale * x_scale
    clamped = y_norm * x_norm * both_scales < eps
    dot = (x * y).sum(1)
    cosine = torch.where(clamped, dot * both_scales / eps, dot / (y_norm * x_norm))
    root = torch.linalg.vector_norm(e_scaled, dim=1) / math.sqrt(width)  # root of the row's MSE, over e_scale
    magnitude = e.abs() + POWER_BIAS

    weight = torch.ones_like(dot) if row_weight is None else row_weight
    if reduction == MEAN:
        weight = weight / (count if row_weight is None else row_weight.sum())
    rows = torch.zeros_like(dot)
    if cosine_weight:
        rows = rows + cosine_weight * (1 - cosine)
    if mse_weight:
        rows = rows + mse_weight * (e_scale * root).square()
    if power_weight:
        rows = rows + power_weight * magnitude.pow(alpha).mean(1)
    rmse = e_scale * root
    if rmse_weight and reduction == MEAN:  # There is one root for the batch.
        largest = e_scale.max() if count else e_scale.sum()
        rmse = largest * (weight * (e_scale / largest * root).square()).sum().sqrt()
    elif rmse_weight:
        rows = rows + rmse_weight * rmse
    rows = weight * rows
    loss = rows if reduction == NONE else rows.sum()
    if count == 0 and reduction == MEAN:
        loss = loss / 0
    if rmse_weight and reduction == MEAN:
        loss = loss + rmse_weight * rmse

    # d loss / d row of each term, per row; the vectors are divided by their scales.
    row = weight if grad_loss is None else weight * grad_loss
    from_error = row * (2 * mse_weight / width)
    error = from_error.unsqueeze(1) * e
    if rmse_weight:  # 1 / rmse may leave the range where e / rmse does not.
        of_root = torch.where(rmse == 0, 0.0, e.t() / rmse).t()
        error = error + (row * (rmse_weight / width)).unsqueeze(1) * of_root
    if power_weight:
        slope = (row * (power_weight * alpha / width)).unsqueeze(1) * magnitude.pow(alpha - 1)
        error = error + slope * e.sign()

    def gradient(
        a: Tensor, a_norm: Tensor, a_scale: Tensor, b: Tensor, b_norm: Tensor, b_scale: Tensor
    ) -> Tensor:
        slope = row * cosine_weight
        from_a = torch.where(clamped, 0.0, slope * cosine / (a_norm * a_norm * a_scale))
        from_b = -torch.where(clamped, slope / eps * b_scale, slope / (a_norm * b_norm * a_scale))
        return from_a.unsqueeze(1) * a + from_b.unsqueeze(1) * b

    grad_output = grad_target = output.new_empty(0)
    if needs_output:
        grad = error if not cosine_weight else error + gradient(y, y_norm, y_scale, x, x_norm, x_scale)
        grad_output = grad.to(output.dtype)
    if needs_target:
        grad = -error if not cosine_weight else gradient(x, x_norm, x_scale, y, y_norm, y_scale) - error
        grad_target = grad.to(output.dtype)
    return loss, grad_output, grad_target


def _scaled_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by scales (N,) that keep their squares in range, and the scales; 1 for ordinary rows."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=1)
    outside = (largest > _LARGE) | ((largest < _SMALL) & (largest > 0))
    scale = torch.where(outside, largest, 1.0)
    return rows / scale.unsqueeze(1), scale
