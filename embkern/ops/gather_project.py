"""gather_project: rows of a factorised table, ``codes[ids] @ basis + offset``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, select
from .library import define, differentiable_once, needs_autograd, overload

_NO_PADDING = -1


def _forward_fake(ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None) -> Tensor:
    return codes.new_empty(ids.shape[0], basis.shape[1])


def _backward_fake(
    grad: Tensor,
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    padding_idx: int,
    needs_codes: bool,
    needs_basis: bool,
    needs_offset: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        codes.new_empty(codes.shape if needs_codes else (0,)),
        basis.new_empty(basis.shape if needs_basis else (0,)),
        basis.new_empty((basis.shape[1],) if needs_offset else (0,)),
    )


define(
    "gather_project_forward",
    "(Tensor ids, Tensor codes, Tensor basis, Tensor? offset) -> Tensor",
    backends=("native",),
    fake=_forward_fake,
)
define(
    "gather_project_backward",
    "(Tensor grad, Tensor ids, Tensor codes, Tensor basis, int padding_idx, "
    "bool needs_codes, bool needs_basis, bool needs_offset) -> (Tensor, Tensor, Tensor)",
    backends=("native",),
    fake=_backward_fake,
)

_FORWARD: dict[str, Callable] = {
    "native": overload("gather_project_forward", "native"),
    "torch": reference.gather_project_forward,
}
_BACKWARD: dict[str, Callable] = {
    "native": overload("gather_project_backward", "native"),
    "torch": reference.gather_project_backward,
}


class GatherProject(Function):
    """Autograd of gather_project; the backend of the forward also runs the backward."""

    @staticmethod
    def forward(
        ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, padding_idx: int, backend: str
    ) -> Tensor:
        """Run the backend's forward on flat, validated arguments."""
        return _FORWARD[backend](ids, codes, basis, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep what the backward reads."""
        ids, codes, basis, _, ctx.padding_idx, ctx.backend = inputs
        ctx.save_for_backward(ids, codes, basis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Return the gradients of codes, basis and offset that are asked for."""
        ids, codes, basis = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        with torch.no_grad(), _autocast_off(grad.device.type):
            grads = _BACKWARD[ctx.backend](grad.contiguous(), ids, codes, basis, ctx.padding_idx, *needs)
        wanted = [
            differentiable_once(each, grad, codes, basis) if needed else None
            for each, needed in zip(grads, needs, strict=True)
        ]
        return None, *wanted, None, None


def gather_project(
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Rows of a factorised embedding table, gathered and projected.

    ``F.embedding(ids, codes) @ basis + offset``

    Sums run in fp32 (float64 for float64 factors) and are rounded once; the result has the factors' dtype,
    under autocast too, like ``F.embedding``. Gradients flow to codes, basis and offset, once
    (no double backward); those of repeated ids are summed in fp32.

    Args:
        ids: indices into the vocabulary, any shape (``*``), int32 or int64.
        codes: (V, r), one row per token.
        basis: (r, H), shared by all tokens.
        offset: (H,), added to every row.
        padding_idx: positions with this id contribute no gradient, to codes (as in ``F.embedding``), basis
            and offset alike.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        (``*``, H), in the factors' dtype.

    Raises:
        IndexError: an id is negative or not below V (on CPU; on CUDA a device-side assertion).
        TypeError: a dtype is not supported, or the factors' dtypes differ.
        ValueError: shapes or devices do not fit, or ``backend`` is unknown.
        RuntimeError: the backend asked for cannot serve this call.

    Source: arXiv 2106.08181, section 3: at inference a token's row is decoded from its latent code.
    """
    _check(ids, codes, basis, offset, padding_idx)
    chosen = select("gather_project", codes.device.type, codes.dtype, backend)
    flat = ids.reshape(-1).contiguous()
    codes, basis = codes.contiguous(), basis.contiguous()
    offset = None if offset is None else offset.contiguous()
    with _autocast_off(codes.device.type):
        if needs_autograd(codes, basis, offset):
            padding = _NO_PADDING if padding_idx is None else padding_idx % codes.shape[0]
            rows = GatherProject.apply(flat, codes, basis, offset, padding, chosen)
        else:
            rows = _FORWARD[chosen](flat, codes, basis, offset)
    return rows.view(*ids.shape, basis.shape[1])


def _autocast_off(device_type: str) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check(ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, padding_idx: int | None) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected dtype torch.int32 or torch.int64, got {ids.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected shape (V, r), got {tuple(codes.shape)}")
    if basis.dim() != 2 or basis.shape[0] != codes.shape[1]:
        raise ValueError(
            f"basis: expected shape (r, H) with r = {codes.shape[1]} as in codes, got {tuple(basis.shape)}"
        )
    if offset is not None and (offset.dim() != 1 or offset.shape[0] != basis.shape[1]):
        raise ValueError(f"offset: expected shape ({basis.shape[1]},), got {tuple(offset.shape)}")
    for name, tensor in (("basis", basis), ("offset", offset)):
        if tensor is not None and tensor.dtype != codes.dtype:
            raise TypeError(f"{name}: expected dtype {codes.dtype} as in codes, got {tensor.dtype}")
    for name, tensor in (("ids", ids), ("basis", basis), ("offset", offset)):
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(f"{name}: expected device {codes.device} as in codes, got {tensor.device}")
    if padding_idx is not None and not -codes.shape[0] <= padding_idx < codes.shape[0]:
        raise ValueError(f"padding_idx: expected an id below {codes.shape[0]}, got {padding_idx}")
