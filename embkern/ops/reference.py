"""Every op in plain torch: the definition, the oracle of the tests, and the last-resort backend.

The forwards are the formulas that the docstrings promise; run in float64 they are what every kernel is
checked against. The backwards are the gradients the kernels compute, written out; the tests hold them to
autograd of the forwards. Sums run in fp32 for narrower dtypes (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_off(function: Callable) -> Callable:
    """Keep autocast from narrowing the products: the result has the factors' dtype, like F.embedding's."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        device_type = first.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return function(first, *args)
        return function(first, *args)

    return call


@_autocast_off
def gather_project_forward(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    """``scale * (codes[ids] @ basis + offset)``: ids (*), codes (V, r), basis (r, H), offset (H,); (*, H)."""
    rows = F.embedding(ids.reshape(-1), codes)
    # Products of bf16 and fp16 accumulate in fp32; addmm scales and adds the offset before the one rounding.
    if offset is None:
        nothing = rows.new_zeros(())  # beta 0 ignores it
        rows = rows @ basis if scale == 1 else torch.addmm(nothing, rows, basis, beta=0, alpha=scale)
    else:
        rows = torch.addmm(offset, rows, basis, beta=scale, alpha=scale)
    return rows.view(*ids.shape, basis.shape[1])


@_autocast_off
def gather_project_backward(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    scale: float,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids of sparse rows, gradients of codes, basis and offset; an unneeded one is an empty tensor.

    ``padding_idx`` -1 means none. With ``sparse`` the gradient of codes has one row per position of ids.
    """
    ids = ids.reshape(-1)
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    if scale != 1:
        grad = grad * scale
    code_ids = ids.new_empty(0, dtype=torch.int64)
    grad_codes = grad_basis = grad_offset = grad.new_empty(0)
    if needs_codes and sparse:
        code_ids, grad_codes = ids.long(), grad @ basis.t()
    elif needs_codes:
        per_position = (grad @ basis.t()).to(accumulation_dtype(codes.dtype))
        grad_codes = torch.zeros_like(codes, dtype=per_position.dtype)
        grad_codes = grad_codes.index_add(0, ids, per_position).to(codes.dtype)
    if needs_basis:
        grad_basis = F.embedding(ids, codes).t() @ grad
    if needs_offset:
        grad_offset = grad.sum(0)
    return code_ids, grad_codes, grad_basis, grad_offset


def cosine_mse_forward(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and the statistics (N, 3) that its backward needs: <x, y>, |y|, |x|."""
    dtype = accumulation_dtype(output.dtype)
    y, x = output.to(dtype), target.to(dtype)
    dot = (x * y).sum(1)
    output_norm, target_norm = torch.linalg.vector_norm(y, dim=1), torch.linalg.vector_norm(x, dim=1)
    cosine = dot / (output_norm * target_norm).clamp_min(eps)
    rows = cosine_weight * (1 - cosine) + mse_weight * (x - y).square().mean(1)
    loss = rows.mean() if row_weight is None else (row_weight * rows).sum() / row_weight.sum()
    return loss, torch.stack((dot, output_norm, target_norm), 1)


def cosine_mse_backward(
    grad_loss: Tensor,
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    stats: Tensor,
    cosine_weight: float,
    mse_weight: float,
    eps: float,
) -> Tensor:
    """Gradient of the loss with respect to ``output``, from the forward's statistics."""
    y, x = output.to(stats.dtype), target.to(stats.dtype)
    dot, output_norm, target_norm = stats.unbind(1)
    product = output_norm * target_norm
    clamped = product < eps
    row = grad_loss / output.shape[0] if row_weight is None else grad_loss * row_weight / row_weight.sum()
    cosine = row * cosine_weight
    from_target = -cosine / product.clamp_min(eps)
    from_output = torch.where(clamped, 0.0, cosine * (dot / product) / output_norm.square())
    from_error = row * (2 * mse_weight / output.shape[1])
    if from_error.dim():
        from_error = from_error.unsqueeze(1)
    grad = from_output.unsqueeze(1) * y + from_target.unsqueeze(1) * x + from_error * (y - x)
    return grad.to(output.dtype)
