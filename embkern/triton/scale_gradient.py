"""scale_gradient_ in Triton: ``grad *= grad_loss``, in place, where the factor is not 1.

grad (N, ...), grad_loss a scalar or (N,). What has the factor 1 is neither read nor written.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: constants have one, and scalars that must not become fp32.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .sizes import cdiv, next_power_of_2
from .tiles import Device, describe_device, row_tile_of

_SCALE_BLOCK = 4096


@triton.jit(do_not_specialize=["size"], debug=True)
def _scale_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """``grad *= factor``, a scalar, in a few programs that end at once if it is 1."""
    accumulator: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(factor_ptr).to(accumulator)
    if factor != 1.0:
        i = tl.arange(0, BLOCK)
        whole = size // BLOCK  # A mask that depends on size would make loads scalar.
        for block in range(tl.program_id(0), whole, tl.num_programs(0)):
            at = grad_ptr + tl.cast(block, tl.int64) * BLOCK + i
            tl.store(at, (tl.load(at).to(accumulator) * factor).to(grad_ptr.dtype.element_ty))
        if tl.program_id(0) == 0:
            rest = whole.to(tl.int64) * BLOCK + i
            grad = tl.load(grad_ptr + rest, mask=rest < size, other=0.0).to(accumulator)
            tl.store(grad_ptr + rest, (grad * factor).to(grad_ptr.dtype.element_ty), mask=rest < size)


@triton.jit(do_not_specialize=["N"], debug=True)
def _scale_rows_kernel(
    grad_ptr, factor_ptr, N, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr
):
    """``grad *= factor``, one per row; a row whose factor is 1 is not touched."""
    accumulator: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(factor_ptr + n, mask=n < N, other=1.0).to(accumulator)
    scaled = factor != 1.0
    if tl.max(scaled.to(tl.int32), 0) > 0:
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            at = grad_ptr + n[:, None] * H + h[None, :]
            mask = scaled[:, None] & (h < H)[None, :]
            grad = tl.load(at, mask=mask, other=0.0).to(accumulator) * factor[:, None]
            tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def scale_gradient_(grad: Tensor, grad_loss: Tensor) -> None:
    """Multiply grad (N, ...), contiguous, in place by grad_loss, a scalar or (N,).

    The kernel tests for the factor 1, so that the host does not wait.
    """
    if grad.numel():
        with torch.cuda.device_of(grad):
            scale_launch(grad, grad_loss.contiguous()).run()


def scale_launch(grad: Tensor, grad_loss: Tensor, device: Device | None = None) -> Launch:
    """Return the launch of scale_gradient_."""
    device = device or describe_device(grad)
    if grad_loss.dim() == 0:
        arguments = dict(grad_ptr=grad, factor_ptr=grad_loss, size=grad.numel(), BLOCK=_SCALE_BLOCK)
        # Eight programs fill a multiprocessor; so few cost little where they end at once.
        programs = min(cdiv(grad.numel(), _SCALE_BLOCK), 8 * device.processors)
        return Launch(_scale_kernel, (programs,), arguments, num_warps=8)
    N = grad.shape[0]
    H = grad.numel() // N
    tile = row_tile_of(grad.dtype, N, H)
    width = tile.BLOCK_H * next_power_of_2(tile.PARTS)
    arguments = dict(grad_ptr=grad, factor_ptr=grad_loss, N=N, H=H, BLOCK_N=tile.BLOCK_N, BLOCK_H=width)
    return Launch(_scale_rows_kernel, (cdiv(N, tile.BLOCK_N),), arguments, tile.num_warps)
