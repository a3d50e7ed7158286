"""The form of autoencoder_loss that writes the reconstruction, a block of rows at a time.

y is written, 32 MiB of it at a time, where it is needed (the power term), where it is cheaper
(few rows, or a rank near H) or safer (fp16: t would leave its range). Its gradient then comes from the
kernel of cosine_mse_loss, without a loss.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: only constants and fp64 scalars have one.)

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...ops import reference
from ..cosine_mse import forward_launches
from ..device_functions import POWER_BIAS, error_power
from ..launch import Launch
from ..sizes import cdiv
from .shared import (
    SUMS,
    Model,
    Options,
    finish_launch,
    product,
    row_cosine,
    row_weights,
    store_sums,
    tile_of_rows,
)

# Rows and columns per program or step; few rows are spread over more programs.
ROWS_TILE, FEW_ROWS_TILE, _FEW_ROWS = (8, 128), (4, 256), 4096
# Bytes of y that exist at one time.
Y_BYTES = 32 << 20


@triton.jit(do_not_specialize=["N"])
def _rows_kernel(
    y_ptr,
    target_ptr,
    target_norm_ptr,
    row_weight_ptr,
    sums_ptr,
    alpha: tl.float64,
    eps: tl.float64,
    N,
    H: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sums over a block of rows whose reconstruction is in memory."""
    element: tl.constexpr = y_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    dot = tl.zeros((BLOCK_N,), tl.float64)
    yy, xx, ee, power = dot, dot, dot, dot
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tile_of_rows(target_ptr, n, h, inside, H).to(accumulator)
        y = tile_of_rows(y_ptr, n, h, inside, H).to(accumulator)
        e = x - y
        if POWER == "linear":
            power += tl.sum(tl.where((h < H)[None, :], tl.abs(e) + POWER_BIAS, 0.0), 1)
        elif POWER == "power":
            powers = error_power(e, tl.full((), alpha, accumulator), element)
            power += tl.sum(tl.where((h < H)[None, :], powers, 0.0), 1)
        x, y, e = x.to(tl.float64), y.to(tl.float64), e.to(tl.float64)
        dot += tl.sum(x * y, 1)
        yy += tl.sum(y * y, 1)
        xx += tl.sum(x * x, 1)
        ee += tl.sum(e * e, 1)
    if target_norm_ptr is not None:
        norm = tl.load(target_norm_ptr + n, mask=inside, other=0.0).to(tl.float64)
        xx = norm * norm
    cosine, _, _ = row_cosine(dot, xx, yy, eps)
    mse = ee / H
    weight = row_weights(row_weight_ptr, n, inside)
    store_sums(sums_ptr, weight, cosine, mse, tl.sqrt(mse), power / H, inside)


def loss_by_rows(
    target: Tensor,
    model: Model,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    options: Options,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, encoder_weight, encoder_bias, basis, offset = model
    (N, H), r = target.shape, basis.shape[0]
    dtype, work = target.dtype, reference.accumulation_dtype(target.dtype)
    tile = ROWS_TILE if N > _FEW_ROWS else FEW_ROWS_TILE
    step = max(1, Y_BYTES // (H * target.itemsize) // tile[0]) * tile[0]
    blocks = [slice(first, min(first + step, N)) for first in range(0, N, step)]
    sums = target.new_empty((cdiv(N, tile[0]), SUMS.value), dtype=torch.float64)
    finish, terms, totals = finish_launch(sums, H, work, options)

    def reconstruct(rows: slice) -> tuple[Tensor, Tensor]:
        if encoder_weight is not None:
            mine = F.linear(target[rows], encoder_weight, encoder_bias)
        else:
            assert codes is not None
            mine = codes[rows]
        return mine, mine @ basis if offset is None else torch.addmm(offset, mine, basis)

    def measure(rows: slice, y: Tensor) -> None:
        mine = sums[rows.start // tile[0] :]
        norm, weight = _part(target_norm, rows), _part(row_weight, rows)
        rows_launch(y, target[rows], norm, weight, mine, options, tile).run()

    # A single block is the whole batch. The mean over several blocks is their sum with weights that sum to 1.
    # The gradient of its root is that of the squared error with weights that depend on the root, which is
    # therefore computed first.
    blockwise, weight, root_weight = options, row_weight, None
    root_first = needs_grad and len(blocks) > 1 and options.reduction == reference.MEAN
    if root_first:
        blockwise = options._replace(reduction=reference.SUM, rmse_weight=0.0)
        weight = target.new_ones(N, dtype=work) if row_weight is None else row_weight
        weight = weight / weight.sum()
        root_first = options.rmse_weight != 0
    if root_first:
        assert weight is not None
        for rows in blocks:
            measure(rows, reconstruct(rows)[1])
        finish.run()
        root_weight = (weight * (totals[1] * (H / 2))).to(work)
    squares = blockwise._replace(cosine_weight=0.0, mse_weight=1.0, power_weight=0.0)

    def slope(rows: slice, y: Tensor, weight: Tensor | None, options: Options) -> Tensor:
        grad = torch.empty_like(y)
        norm, weight = _part(target_norm, rows), _part(weight, rows)
        for launch in gradient_launches(y, target[rows], norm, weight, grad, options):
            launch.run()
        return grad

    grad_codes = target.new_empty((N, r) if needs_grad and codes is not None else 0)
    grads: list[Tensor | None] = [None] * 4  # of encoder_weight, encoder_bias, basis and offset
    for rows in blocks:
        block_codes, y = reconstruct(rows)
        if not root_first:
            measure(rows, y)
        if not needs_grad:
            continue
        grad = slope(rows, y, weight, blockwise)
        if root_weight is not None:
            grad += slope(rows, y, root_weight, squares)
        parts: list[Tensor | None] = [None, None, product(block_codes.t(), grad), None]
        if encoder_weight is not None:
            block_grad_codes = grad @ basis.t()
            parts[0] = product(block_grad_codes.t(), target[rows])
            if encoder_bias is not None:
                parts[1] = block_grad_codes.sum(0, dtype=work)
        else:
            torch.mm(grad, basis.t(), out=grad_codes[rows])
        if offset is not None:
            parts[3] = grad.sum(0, dtype=work)
        grads = [
            part if grad is None or part is None else grad.add_(part)
            for grad, part in zip(grads, parts, strict=True)
        ]
    if not root_first:
        finish.run()
    others = (target.new_empty(0) if each is None else each.to(dtype) for each in grads)
    return terms, grad_codes, *others  # type: ignore[return-value]


def _part(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def rows_launch(
    y: Tensor,
    target: Tensor,
    target_norm: Tensor | None,
    row_weight: Tensor | None,
    sums: Tensor,
    options: Options,
    tile: tuple[int, int],
) -> Launch:
    """Return the launch that sums rows with reconstruction y (N, H) into the first entries of ``sums``."""
    N, H = target.shape
    arguments = dict(
        y_ptr=y,
        target_ptr=target,
        target_norm_ptr=target_norm,
        row_weight_ptr=row_weight,
        sums_ptr=sums,
        alpha=options.alpha,
        eps=options.eps,
        N=N,
        H=H,
        POWER=None if options.power_weight == 0 else "linear" if options.alpha == 1 else "power",
        BLOCK_N=tile[0],
        BLOCK_H=tile[1],
    )
    return Launch(_rows_kernel, (cdiv(N, tile[0]),), arguments, num_warps=4)


def gradient_launches(
    y: Tensor,
    target: Tensor,
    target_norm: Tensor | None,
    row_weight: Tensor | None,
    grad: Tensor,
    options: Options,
) -> list[Launch]:
    """Return the launches that fill the gradient of y (N, H), which compute no loss."""
    return forward_launches(
        y,
        target,
        row_weight,
        target_norm,
        grad_loss=None,
        reduction=options.reduction,
        weights=options[1:5],
        alpha=options.alpha,
        eps=options.eps,
        loss=None,
        grad_output=grad,
        grad_target=None,
    )
