"""gather_project in Triton: ``scale * (codes[ids] @ basis + offset)``, its out= form and its gradients.

    forward          out[n]          = scale * (codes[ids[n]] @ basis + offset)
    grad of codes    grad_codes[v]   = scale * sum over n with ids[n] = v of grad[n] @ basis^T
    grad of basis    grad_basis      = scale * sum over n of codes[ids[n]]^T grad[n]
    grad of offset   grad_offset     = scale * sum over n of grad[n]

ids (N,), codes (V, r) with rows at any distance, basis (r, H), offset (H,), grad and out (N, H). Sums run in
fp32 (fp64 for fp64) and are rounded once. There are no atomics and the order of every sum is fixed: the same
call gives the same bits.

Three kernels multiply (one block of rows by one block of columns per program, tensor cores for 16-bit
factors); three more add sums that several programs share. r and H are constants of a model and therefore
constexpr: the compiler knows how rows are aligned (r = 72 still loads 16 bytes at a time). Row offsets are
64-bit.

`tl.dot` takes fp32 operands with ``input_precision="ieee"``. Tensor cores would cut them to TF32 (10 of 23
bits), and three TF32 products (tf32x3) still drop the product of the two low parts and sum with truncation,
which is not safely within twice the error of a plain fp32 product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward import forward_launch
from .grad_basis import grad_basis_launches
from .grad_codes import project_grad_launch, sum_grad_codes


def gather_project_forward(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float
) -> Tensor:
    """Return ``scale * (codes[ids] @ basis + offset)``, (``*ids.shape``, H) in the factors' dtype."""
    out = codes.new_empty(*ids.shape, basis.shape[1])
    gather_project_out(ids, codes, basis, offset, scale, out)
    return out


def gather_project_out(
    ids: Tensor, codes: Tensor, basis: Tensor, offset: Tensor | None, scale: float, out: Tensor
) -> None:
    """Write ``scale * (codes[ids] @ basis + offset)`` into ``out``, (``*ids.shape``, H), contiguous."""
    if out.numel():
        with torch.cuda.device_of(codes):
            forward_launch(ids, codes, basis, offset, scale, out).run()


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
    """Return (code_ids, grad_codes, grad_basis, grad_offset); one that is not needed is empty.

    Args:
        grad: (N, H), the gradient of the rows.
        ids: N ids, int32 or int64.
        codes: (V, r); its rows may be any number of elements apart.
        basis: (r, H).
        scale: that of the forward.
        padding_idx: positions with this id contribute no gradient; -1 for none.
        needs_codes: whether grad_codes is needed.
        needs_basis: whether grad_basis is needed.
        needs_offset: whether grad_offset is needed.
        sparse: return one row of grad_codes per position (N, r), zero for padding, and the ids in code_ids
            (N,) int64, in place of the dense (V, r). This uncoalesced form needs no sort.
    """
    code_ids = ids.new_empty(0, dtype=torch.int64)
    grad_codes = grad_basis = grad_offset = codes.new_empty(0)
    nothing = grad.numel() == 0
    allocate = codes.new_zeros if nothing else codes.new_empty
    if needs_codes:
        grad_codes = allocate(ids.numel(), codes.shape[1]) if sparse else codes.new_zeros(codes.shape)
        code_ids = ids.reshape(-1).to(torch.int64, copy=True) if sparse else code_ids
    if needs_basis:
        grad_basis = allocate(basis.shape)
    if needs_offset:
        grad_offset = allocate(basis.shape[1])
    if nothing:
        return code_ids, grad_codes, grad_basis, grad_offset
    with torch.cuda.device_of(codes):
        # Gradients that are not needed have no elements; at rank 0 those of codes and basis have none either.
        if grad_codes.numel() and sparse:
            project_grad_launch(grad, ids, codes, basis, scale, padding_idx, grad_codes).run()
        elif grad_codes.numel():
            sum_grad_codes(grad, ids, codes, basis, scale, padding_idx, grad_codes)
        if grad_basis.numel() or grad_offset.numel():
            for launch in grad_basis_launches(grad, ids, codes, scale, padding_idx, grad_basis, grad_offset):
                launch.run()
    return code_ids, grad_codes, grad_basis, grad_offset
