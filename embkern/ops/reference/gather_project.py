"""Definition of gather_project and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import accumulation_dtype, autocast_off


@autocast_off
def gather_project_forward(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    """``scale * (codes[ids] @ basis + offset)``: ids (*), codes (V, r), basis (r, H), offset (H,); (*, H)."""
    rows = F.embedding(ids.reshape(-1), codes)
    # Products of bf16 and fp16 accumulate in fp32; addmm scales and adds the offset before the only rounding.
    if offset is None:
        nothing = rows.new_zeros(())  # With beta 0, addmm ignores it.
        rows = rows @ basis if scale == 1 else torch.addmm(nothing, rows, basis, beta=0, alpha=scale)
    else:
        rows = torch.addmm(offset, rows, basis, beta=scale, alpha=scale)
    return rows.view(*ids.shape, basis.shape[1])


@autocast_off
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
    """Ids of sparse rows, gradients of codes, basis and offset; one that is not needed is an empty tensor.

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
