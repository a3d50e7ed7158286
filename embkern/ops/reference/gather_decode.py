"""Definition of gather_decode and its gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packed_codes import ShiftRight, shift_by_division
from ..packed_format import packed_values
from .numerics import accumulation_dtype, autocast_off


@autocast_off
def gather_decode_forward(
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
    shift_right: ShiftRight = torch.bitwise_right_shift,
) -> Tensor:
    """``scale * (scales[ids] * rows + offset)``: rows of a packed table, ids (*); (*, H)."""
    flat, dtype = ids.reshape(-1).long(), accumulation_dtype(scales.dtype)
    factor = scales.index_select(0, flat).to(dtype)  # It raises if an id is out of range.
    transform, values = packed_values(flat, records, directory, tiers, levels, shift_right)
    rows = _unscaled_rows(transform, values, basis, embedding_dim, dtype) * factor.unsqueeze(1)
    if offset is not None:
        rows = rows + offset.to(dtype)
    return (rows * scale).to(scales.dtype).view(*ids.shape, embedding_dim)


def gather_decode_in_aten(*arguments: Any) -> Tensor:
    """``gather_decode_forward`` with operators that ONNX has."""
    return gather_decode_forward(*arguments, shift_right=shift_by_division)


@autocast_off
def gather_decode_backward(
    grad: Tensor,
    ids: Tensor,
    records: Tensor,
    directory: Tensor,
    tiers: Tensor,
    levels: Tensor,
    scales: Tensor,
    basis: Tensor | None,
    scale: float,
    padding_idx: int,
    needs_scales: bool,
    needs_basis: bool,
    needs_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scales, basis and offset for grad (N, H); one that is not needed is an empty tensor."""
    flat, dtype = ids.reshape(-1).long(), accumulation_dtype(scales.dtype)
    grad = grad.to(dtype) * scale
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx).unsqueeze(1), 0)
    grad_scales = grad_basis = grad_offset = scales.new_empty(0)
    if needs_scales or needs_basis:
        transform, values = packed_values(flat, records, directory, tiers, levels)
    if needs_scales:
        rows = _unscaled_rows(transform, values, basis, grad.shape[1], dtype)
        per_row = (rows * grad).sum(1)
        grad_scales = torch.zeros_like(scales, dtype=dtype).index_add(0, flat, per_row).to(scales.dtype)
    if needs_basis:
        assert basis is not None
        factor = torch.where(transform, scales[flat].to(dtype), 0.0)
        grad_basis = ((_coefficients(values, basis) * factor.unsqueeze(1)).t() @ grad).to(basis.dtype)
    if needs_offset:
        grad_offset = grad.sum(0).to(scales.dtype)
    return grad_scales, grad_basis, grad_offset


def _unscaled_rows(
    transform: Tensor, values: Tensor, basis: Tensor | None, embedding_dim: int, dtype: torch.dtype
) -> Tensor:
    """Rows (N, H) before their scale and the offset."""
    direct = F.pad(values, (0, max(0, embedding_dim - values.shape[1])))[:, :embedding_dim].to(dtype)
    if basis is None:
        return direct
    return torch.where(transform.unsqueeze(1), _coefficients(values, basis) @ basis.to(dtype), direct)


def _coefficients(values: Tensor, basis: Tensor) -> Tensor:
    size = basis.shape[0]
    return F.pad(values, (0, max(0, size - values.shape[1])))[:, :size].to(accumulation_dtype(basis.dtype))
