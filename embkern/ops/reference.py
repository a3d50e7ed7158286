"""Every op in plain torch: the definition, the oracle of the tests, and the last-resort backend.

The forwards are the formulas that the docstrings promise; run in float64 they are what every kernel is
checked against. The backwards are the gradients the kernels compute, written out; the tests hold them to
autograd of the forwards. Sums run in fp32 for narrower dtypes (float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_project_forward(ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None) -> Tensor:
    """``codes[ids] @ basis + offset``: ids (N,), codes (V, r), basis (r, H), offset (H,) -> (N, H)."""
    rows = F.embedding(ids, codes)
    # matmul of bf16 and fp16 accumulates in fp32 and addmm adds the offset before the one rounding.
    return rows @ basis if offset is None else torch.addmm(offset, rows, basis)


def gather_project_backward(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of codes, basis and offset; an unneeded one is an empty tensor. padding_idx -1 means none."""
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    grad_codes = grad_basis = grad_offset = grad.new_empty(0)
    if needs_codes:
        per_position = (grad @ basis.t()).to(accumulation_dtype(codes.dtype))
        grad_codes = torch.zeros_like(codes, dtype=per_position.dtype)
        grad_codes = grad_codes.index_add(0, ids, per_position).to(codes.dtype)
    if needs_basis:
        grad_basis = F.embedding(ids, codes).t() @ grad
    if needs_offset:
        grad_offset = grad.sum(0)
    return grad_codes, grad_basis, grad_offset


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
