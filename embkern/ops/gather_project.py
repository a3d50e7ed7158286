"""gather_project: rows of a factorised table, ``scale * (codes[ids] @ basis + offset)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backends import Backend, regime_of, select, select_backward
from .library import (
    apply,
    check_ids,
    define,
    differentiable_once,
    is_exporting_to_onnx,
    needs_autograd,
    overload,
    raise_refusal,
)

_NO_PADDING = -1


def _forward_fake(ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float) -> Tensor:
    _check(ids, codes, basis, offset)  # A trace does not reach the checks of the native op.
    return codes.new_empty(*ids.shape, basis.shape[1])


def _out_fake(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float, out: Tensor
) -> None:
    _check(ids, codes, basis, offset, out)


def _backward_fake(
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
    rows = ids.numel() if sparse else codes.shape[0]  # The native kernel returns one row per distinct id.
    return (
        ids.new_empty(rows if sparse and needs_codes else 0, dtype=torch.int64),
        codes.new_empty((rows, codes.shape[1]) if needs_codes else (0,)),
        basis.new_empty(basis.shape if needs_basis else (0,)),
        basis.new_empty((basis.shape[1],) if needs_offset else (0,)),
    )


define(
    "gather_project_forward",
    "(Tensor ids, Tensor codes, Tensor basis, Tensor? offset, float scale) -> Tensor",
    backends=("native", "triton"),
    fake=_forward_fake,
    decomposition=reference.gather_project_forward,
)
define(
    "gather_project_out",
    "(Tensor ids, Tensor codes, Tensor basis, Tensor? offset, float scale, Tensor(a!) out) -> ()",
    backends=("native", "triton"),
    fake=_out_fake,
)
define(
    "gather_project_backward",
    "(Tensor grad, Tensor ids, Tensor codes, Tensor basis, float scale, int padding_idx, bool needs_codes, "
    "bool needs_basis, bool needs_offset, bool sparse) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=("native", "triton"),
    fake=_backward_fake,
)


def _torch_out(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float, out: Tensor
) -> None:
    out.copy_(reference.gather_project_forward(ids, codes, basis, offset, scale))


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "native": overload("gather_project_forward", "native"),
    "triton": overload("gather_project_forward", "triton"),
    "torch": reference.gather_project_forward,
}
_OUT: dict[str, Callable[..., None]] = {
    "native": overload("gather_project_out", "native"),
    "triton": overload("gather_project_out", "triton"),
    "torch": _torch_out,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "native": overload("gather_project_backward", "native"),
    "triton": overload("gather_project_backward", "triton"),
    "torch": reference.gather_project_backward,
}


class GatherProject(Function):
    """Autograd of gather_project; the backend of the forward runs the backward if it implements one."""

    @staticmethod
    def forward(
        ids: Tensor,
        codes: Tensor,
        basis: Tensor,
        offset: Tensor | None,
        scale: float,
        padding_idx: int,
        sparse: bool,
        backend: str,
    ) -> Tensor:
        """Run the backend's forward."""
        return _FORWARD[backend](ids, codes, basis, offset, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the tensors that the backward reads."""
        ids, codes, basis, _, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(ids, codes, basis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of codes, basis and offset that are needed."""
        ids, codes, basis = ctx.saved_tensors
        scale, padding_idx, sparse = ctx.options
        needs = ctx.needs_input_grad[1:4]
        flat = grad.reshape(ids.numel(), basis.shape[1]).contiguous()
        device_type = grad.device.type
        backend = select_backward("gather_project", device_type, codes.dtype, ctx.backend)
        with torch.no_grad():
            code_ids, *grads = _BACKWARD[backend](flat, ids, codes, basis, scale, padding_idx, *needs, sparse)
            if sparse and needs[0]:
                # The native CPU kernel returns each id once, in order; others one row per position.
                coalesced = backend == "native" and device_type == "cpu"
                # The argument check_invariants makes torch 2.11 warn that it is missing, whatever its value.
                with torch.sparse.check_sparse_tensor_invariants(False):
                    grads[0] = torch.sparse_coo_tensor(
                        code_ids[None], grads[0], codes.shape, is_coalesced=coalesced
                    )
        wanted = [
            differentiable_once(each, grad, codes, basis) if needed else None
            for each, needed in zip(grads, needs, strict=True)
        ]
        return None, *wanted, None, None, None, None


def gather_project(
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None = None,
    *,
    scale: float = 1.0,
    padding_idx: int | None = None,
    sparse: bool = False,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Look up rows of a factorised embedding table: gather codes, project them onto the basis.

    ``scale * (F.embedding(ids, codes) @ basis + offset)``

    Sums run in fp32 (float64 for float64 factors) and are rounded once; the result has the factors' dtype,
    under autocast too, like ``F.embedding``. Gradients flow to codes, basis and offset, once
    (no double backward); those of repeated ids are summed in fp32. With the native CPU kernels, the bits of a
    row depend neither on the other ids nor on the number of threads.

    Args:
        ids: indices into the vocabulary, any shape (``*``), int32 or int64.
        codes: (V, r), one row per token; the stride between rows is arbitrary, and a view of the columns of
            a wider matrix is not copied. Rows that start on 16 bytes are read fastest on CUDA, whatever r.
        basis: (r, H), shared by all tokens.
        offset: (H,), added to every row.
        scale: factor on the result, applied before the rounding.
        padding_idx: positions with this id contribute no gradient, to codes (as in ``F.embedding``), basis
            and offset alike.
        sparse: make the gradient of codes a sparse COO tensor of the rows that were looked up, as in
            ``F.embedding``, in place of a dense (V, r) one. Not supported under ``torch.compile``.
        out: (``*``, H), contiguous, in the factors' dtype: written in place and returned. It saves the
            allocation, whose page faults dominate a large lookup on CPU. No gradient flows through it.
        backend: ``native``, ``triton`` or ``torch``; None takes the best for the device.

    Returns:
        (``*``, H), in the factors' dtype.

    Raises:
        IndexError: an id is negative or not below V (on CPU; on CUDA a device-side assertion).
        TypeError: a dtype is not supported, or the factors' dtypes differ.
        ValueError: shapes or devices do not fit, ``out`` has another shape than the result or is given where
            a gradient is needed, or ``backend`` is unknown.
        RuntimeError: the requested backend cannot serve this call.

    Source: arXiv 2106.08181, section 3: at inference a token's row is decoded from its latent code.
    """
    device_type = "cpu" if codes.is_cpu else codes.device.type  # is_cpu makes no torch.device
    regime = None if codes.is_cpu else regime_of(ids.numel())
    chosen = select("gather_project", device_type, codes.dtype, backend, regime)
    try:
        if chosen != "native" or device_type != "cpu":  # The native CPU op checks its arguments itself.
            _check(ids, codes, basis, offset, out)
            ids, codes, basis = ids.contiguous(), _with_adjacent_elements(codes), basis.contiguous()
            offset = None if offset is None else offset.contiguous()
        if padding_idx is not None:
            _check_padding(padding_idx, codes)
        if needs_autograd(codes, basis, offset, out):
            if out is not None:
                raise ValueError("out: expected None where a gradient is needed; use torch.no_grad()")
            if sparse and torch.compiler.is_compiling():
                raise ValueError("sparse: expected False under torch.compile, which has no sparse gradients")
            padding = _NO_PADDING if padding_idx is None else padding_idx % codes.shape[0]
            rows: Tensor = apply(GatherProject, ids, codes, basis, offset, scale, padding, sparse, chosen)
            return rows
        if out is None:
            forward = reference.gather_project_forward if is_exporting_to_onnx() else _FORWARD[chosen]
            return forward(ids, codes, basis, offset, scale)
        _OUT[chosen](ids, codes, basis, offset, scale, out)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(out)  # Autograd has to notice if `out` was saved.
        return out
    except Exception:
        raise_refusal(_check, ids, codes, basis, offset, out)
        raise_refusal(check_ids, ids, codes.shape[0])
        raise


def _check(
    ids: Tensor,
    codes: Tensor,
    basis: Tensor,
    offset: Tensor | None,
    out: Tensor | None = None,
) -> None:
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
    if out is not None and (out.shape != (*ids.shape, basis.shape[1]) or not out.is_contiguous()):
        raise ValueError(
            f"out: expected a contiguous tensor of shape {(*ids.shape, basis.shape[1])}, "
            f"got shape {tuple(out.shape)}, strides {out.stride()}"
        )
    for name, tensor in (("basis", basis), ("offset", offset), ("out", out)):
        if tensor is not None and tensor.dtype != codes.dtype:
            raise TypeError(f"{name}: expected dtype {codes.dtype} as in codes, got {tensor.dtype}")
    for name, tensor in (("ids", ids), ("basis", basis), ("offset", offset), ("out", out)):
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(f"{name}: expected device {codes.device} as in codes, got {tensor.device}")


def _with_adjacent_elements(codes: Tensor) -> Tensor:
    """Return codes if the elements of a row are adjacent, at any distance of rows, and else a copy."""
    return codes if codes.stride(1) == 1 or codes.shape[1] <= 1 else codes.contiguous()


def _check_padding(padding_idx: int, codes: Tensor) -> None:
    if not -codes.shape[0] <= padding_idx < codes.shape[0]:
        raise ValueError(f"padding_idx: expected an id below {codes.shape[0]}, got {padding_idx}")
