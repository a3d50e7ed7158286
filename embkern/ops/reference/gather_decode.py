"""Definition of gather_decode and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packed_codes import GROUP, ShiftRight, shift_by_division
from ..packed_format import packed_values, tiers_of_rows
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
    decode: Callable[..., Tensor] = gather_decode_forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scales, basis and offset for grad (N, H); one that is not needed is an empty tensor.

    ``decode`` is a forward of gather_decode. It returns rows without scales and offset for the gradient of
    the scales, and coefficients times scales for that of the basis, in the dtype of the sums.
    """
    flat, dtype = ids.reshape(-1).long(), accumulation_dtype(scales.dtype)
    grad = grad.to(dtype) * scale
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx).unsqueeze(1), 0)
    grad_scales = grad_basis = grad_offset = scales.new_empty(0)
    if needs_scales:
        ones, wide = torch.ones_like(scales, dtype=dtype), None if basis is None else basis.to(dtype)
        rows = decode(flat, records, directory, tiers, levels, ones, wide, None, grad.shape[1], 1.0)
        grad_scales = torch.zeros_like(ones).index_add(0, flat, (rows * grad).sum(1)).to(scales.dtype)
    if needs_basis:
        assert basis is not None
        width = GROUP * (tiers.shape[1] - 1)
        of_values = torch.cat([torch.zeros_like(tiers[:, :1]), tiers[:, 1:]], 1)
        values = decode(flat, records, directory, of_values, levels, scales.to(dtype), None, None, width, 1.0)
        transform = tiers[:, 0].bool()[tiers_of_rows(directory)[flat]]
        coefficients = torch.where(transform.unsqueeze(1), values, 0.0)
        grad_basis = (_coefficients(coefficients, basis).t() @ grad).to(basis.dtype)
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
