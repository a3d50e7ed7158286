"""cosine_mse_loss in Triton: the loss and its gradients while a row is in registers.

    rows[n] = cosine_weight * (1 - cos[n]) + mse_weight * mse[n]
              + power_weight * mean((|e[n]| + 1e-10) ** alpha)
    loss    = sum over n of w[n] * rows[n], plus rmse_weight times a root: each row's or the batch's
    grad    = d loss / d output, d loss / d target

output, target and the gradients (N, H), e = output - target; reference.cosine_mse_forward is the definition.
Bytes moved: output and target are read once, each gradient that is needed is written once. A row wider than a
program can hold is read twice (the second time mostly from L2), and the root of a whole batch needs a
separate pass over output and target.

A program owns whole rows; a term of weight 0 is compiled out. Each program stores its partial sum of the loss
and another program adds them: there are no atomics, so that the same call gives the same bits. Sums run in
fp32 (fp64 for fp64). Where the squares of a row leave the range of fp32, its program takes the sums again,
scaled by a power of two. H is a constant of a model and therefore constexpr; N is not.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: constants have one, and scalars that must not become fp32.)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.reference import MEAN, NONE, accumulation_dtype
from .device_functions import (
    POWER_BIAS,
    append,
    divide,
    error_power,
    inverse_scale,
    out_of_range,
    square_root,
)
from .launch import Launch
from .sizes import cdiv
from .tiles import row_tile_of

# Partial sums of the weights, all of which every program of the loss adds, and weights per step.
_WEIGHT_SUMS = 128
_WEIGHT_BLOCK = 4096
# Partial sums per step of the program that adds them: 16 per thread, in flight together. The root needs more
# registers, of which each of 512 threads has twice as many as each of 1024.
_PARTIAL_BLOCK = 16384
_ROOT_BLOCK = 8192


@triton.jit
def _load_block(
    output_ptr,
    target_ptr,
    n,
    h,
    N,
    exponent,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    power: tl.constexpr = None,
):
    """Rows ``n`` of output and target, in PARTS from column ``h`` on, zero outside; powers of their error."""
    element: tl.constexpr = output_ptr.dtype.element_ty
    accumulator: tl.constexpr = tl.float64 if element == tl.float64 else tl.float32
    ys, xs, ps = (), (), ()
    for part in tl.static_range(PARTS):
        columns = h + part * h.shape[0]
        offsets = n[:, None] * H + columns[None, :]
        mask = (n < N)[:, None] & (columns < H)[None, :]
        ys = append(ys, tl.load(output_ptr + offsets, mask=mask, other=0.0).to(accumulator))
        xs = append(xs, tl.load(target_ptr + offsets, mask=mask, other=0.0).to(accumulator))
    for part in tl.static_range(PARTS):
        if power == "linear":
            ps = append(ps, tl.full(ys[part].shape, 1.0, accumulator))
        elif power == "power":
            ps = append(ps, error_power(ys[part] - xs[part], exponent, element))
    return ys, xs, ps


@triton.jit
def _add_sums(
    sums,
    ys,
    xs,
    inverse,
    PARTS: tl.constexpr,
    cosine: tl.constexpr,
    x_known: tl.constexpr,
    error: tl.constexpr,
):
    """Add a block to the rows' <y, x>, <y, y>, <x, x> and <e, e>, of y, x and e times the inverse scales."""
    dot, yy, xx, ee = sums
    y_inverse, x_inverse, e_inverse = inverse
    nothing = tl.zeros_like(ys[0])
    dots, yys, xxs, ees = nothing, nothing, nothing, nothing
    for part in tl.static_range(PARTS):
        y, x = ys[part], xs[part]
        e = (y - x) * e_inverse[:, None]
        y, x = y * y_inverse[:, None], x * x_inverse[:, None]
        dots += y * x
        yys += y * y
        xxs += x * x
        ees += e * e
    if cosine:
        dot += tl.sum(dots, 1)
        yy += tl.sum(yys, 1)
        if not x_known:
            xx += tl.sum(xxs, 1)
    if error:
        ee += tl.sum(ees, 1)
    return dot, yy, xx, ee


@triton.jit(do_not_specialize=["N", "weight_sums"], debug=True)
def _cosine_mse_kernel(
    output_ptr,
    target_ptr,
    row_weight_ptr,
    weight_sums_ptr,
    target_norm_ptr,
    grad_loss_ptr,
    root_ptr,
    loss_ptr,
    largest_ptr,
    squares_ptr,
    grad_output_ptr,
    grad_target_ptr,
    row_scale: tl.float64,
    cosine_weight: tl.float64,
    mse_weight: tl.float64,
    rmse_weight: tl.float64,
    power_weight: tl.float64,
    power_slope: tl.float64,
    exponent: tl.float64,
    eps: tl.float64,
    N,
    weight_sums,
    H: tl.constexpr,
    per_row: tl.constexpr,
    cosine: tl.constexpr,
    mse: tl.constexpr,
    rmse: tl.constexpr,
    power: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_WEIGHTS: tl.constexpr,
):
    """Loss and gradients of BLOCK_N rows, in blocks of PARTS times BLOCK_H columns.

    cosine, mse, rmse (of each row) and power ("power", "linear" for alpha 1, or None) say which terms there
    are; all weights but that of the cosine are per column. loss_ptr receives a value per row with
    ``per_row``, otherwise one per program; what only the loss needs is not computed if it is None. For the
    root of the batch, a first pass stores the largest root of a row per program and a sum of squares relative
    to it (largest_ptr, squares_ptr); the second pass reads the root of the batch from root_ptr.
    """
    accumulator: tl.constexpr = tl.float64 if output_ptr.dtype.element_ty == tl.float64 else tl.float32
    WIDTH: tl.constexpr = PARTS * BLOCK_H
    RESIDENT: tl.constexpr = H <= WIDTH  # One block stays in registers; several are loaded in each loop.
    x_known: tl.constexpr = target_norm_ptr is not None
    has_loss: tl.constexpr = loss_ptr is not None
    error: tl.constexpr = (mse and has_loss) or rmse or largest_ptr is not None
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    columns = tl.arange(0, BLOCK_H)
    one = tl.full((BLOCK_N,), 1.0, accumulator)
    zero = tl.zeros((BLOCK_N,), accumulator)
    exponent = tl.full((), exponent, accumulator)

    # The sums of each row.
    if RESIDENT:
        ys, xs, ps = _load_block(output_ptr, target_ptr, n, columns, N, exponent, H, PARTS, power)
    sums = (zero, zero, zero, zero)
    inverse = (one, one, one)
    powers = zero
    for start in range(0, H, WIDTH):
        if not RESIDENT:
            ys, xs, ps = _load_block(output_ptr, target_ptr, n, start + columns, N, exponent, H, PARTS, power)
        sums = _add_sums(sums, ys, xs, inverse, PARTS, cosine, x_known, error)
        if power is not None and has_loss:
            values = tl.zeros_like(ys[0])
            for part in tl.static_range(PARTS):
                there = (start + part * BLOCK_H + columns < H)[None, :]
                values += tl.where(there, (tl.abs(ys[part] - xs[part]) + POWER_BIAS) * ps[part], 0.0)
            powers += tl.sum(values, 1)
    if x_known:
        x_norm = tl.load(target_norm_ptr + n, mask=inside, other=0.0)
        sums = (sums[0], sums[1], x_norm * x_norm, sums[3])

    # Again with scales where squares are out of range, rows of zeros included.
    outside = n < 0
    if cosine:
        outside |= out_of_range(sums[1]) | out_of_range(sums[2])
    if error:
        outside |= out_of_range(sums[3])
    if tl.max((outside & inside).to(tl.int32), 0) > 0:
        y_largest, x_largest, e_largest = zero, zero, zero
        for start in range(0, H, WIDTH):
            if not RESIDENT:
                ys, xs, ps = _load_block(output_ptr, target_ptr, n, start + columns, N, exponent, H, PARTS)
            nothing = tl.zeros_like(ys[0])
            y_part, x_part, e_part = nothing, nothing, nothing
            for part in tl.static_range(PARTS):
                y_part = tl.maximum(y_part, tl.abs(ys[part]))
                x_part = tl.maximum(x_part, tl.abs(xs[part]))
                e_part = tl.maximum(e_part, tl.abs(ys[part] - xs[part]))
            y_largest = tl.maximum(y_largest, tl.max(y_part, 1))
            x_largest = tl.maximum(x_largest, tl.max(x_part, 1))
            e_largest = tl.maximum(e_largest, tl.max(e_part, 1))
        inverse = (inverse_scale(y_largest), inverse_scale(x_largest), inverse_scale(e_largest))
        sums = (zero, zero, zero, zero)
        for start in range(0, H, WIDTH):
            if not RESIDENT:
                ys, xs, ps = _load_block(output_ptr, target_ptr, n, start + columns, N, exponent, H, PARTS)
            sums = _add_sums(sums, ys, xs, inverse, PARTS, cosine, x_known, error)
    dot, yy, xx, ee = sums
    y_inverse, x_inverse, e_inverse = inverse

    # The loss of each row, and its derivatives with respect to the sums, times the incoming gradient.
    weight = tl.full((BLOCK_N,), row_scale, accumulator)
    if row_weight_ptr is not None:
        weight = tl.load(row_weight_ptr + n, mask=inside, other=0.0)
        if weight_sums_ptr is not None:
            i = tl.arange(0, BLOCK_WEIGHTS)
            weight = divide(weight, tl.sum(tl.load(weight_sums_ptr + i, mask=i < weight_sums, other=0.0), 0))
    weight = tl.where(inside, weight, 0.0)
    slope = weight
    if grad_loss_ptr is not None:
        if per_row:
            slope *= tl.load(grad_loss_ptr + n, mask=inside, other=0.0)
        else:
            slope *= tl.load(grad_loss_ptr)
    rows = zero
    from_error, from_power, y_from_y, y_from_x, x_from_x, x_from_y = zero, zero, zero, zero, zero, zero
    if cosine:
        eps = tl.full((), eps, accumulator)
        y_scale, x_scale = inverse_scale(y_inverse), inverse_scale(x_inverse)
        if x_known:
            x_norm *= x_inverse
            xx = x_norm * x_norm
        else:
            x_norm = square_root(xx)
        product = square_root(yy) * x_norm
        clamped = product * (y_scale * x_scale) < eps
        cos = tl.where(clamped, divide(dot * (y_scale * x_scale), eps), divide(dot, product))
        factor = tl.full((), cosine_weight, accumulator)
        rows += factor * (1.0 - cos)
        factor = slope * factor
        across = divide(factor, product)
        at_eps = divide(factor, eps)
        y_from_y = tl.where(clamped, 0.0, divide(factor * cos, yy) * y_inverse)
        x_from_x = tl.where(clamped, 0.0, divide(factor * cos, xx) * x_inverse)
        y_from_x = -tl.where(clamped, at_eps * x_scale, across * y_inverse)
        x_from_y = -tl.where(clamped, at_eps * y_scale, across * x_inverse)
    if error:
        e_scale = inverse_scale(e_inverse)
        root = e_scale * square_root(divide(ee, H))
    if mse:
        factor = tl.full((), mse_weight, accumulator)
        if has_loss:
            rows += factor * (ee * e_scale * e_scale)
        from_error += slope * (2.0 * factor)
    if largest_ptr is not None:
        largest = tl.max(tl.where(weight > 0, root, 0.0), 0)
        relative = divide(root, tl.where(largest > 0, largest, 1.0))
        tl.store(largest_ptr + tl.program_id(0), largest)
        tl.store(squares_ptr + tl.program_id(0), tl.sum(weight * relative * relative, 0))
    if rmse or root_ptr is not None:
        factor = tl.full((), rmse_weight, accumulator)
        if rmse:
            rows += factor * H * root
        else:
            root = tl.load(root_ptr)
        from_error += tl.where(root == 0, 0.0, divide(slope * factor, root))
    if power is not None:
        rows += tl.full((), power_weight, accumulator) * powers
        from_power = slope * tl.full((), power_slope, accumulator)
    if has_loss:
        if per_row:
            tl.store(loss_ptr + n, weight * rows, mask=inside)
        else:
            tl.store(loss_ptr + tl.program_id(0), tl.sum(weight * rows, 0))

    # The gradients: two or three numbers per row times the row.
    if grad_output_ptr is not None or grad_target_ptr is not None:
        for start in range(0, H, WIDTH):
            if not RESIDENT:
                ys, xs, ps = _load_block(
                    output_ptr, target_ptr, n, start + columns, N, exponent, H, PARTS, power
                )
            for part in tl.static_range(PARTS):
                y, x = ys[part], xs[part]
                e = y - x
                by_error = from_error[:, None] * e
                if power is not None:
                    steep = from_power[:, None] * ps[part]
                    by_error += tl.where(e > 0, steep, tl.where(e < 0, -steep, e))  # 0 for 0, NaN for NaN
                h = start + part * BLOCK_H + columns
                offsets = n[:, None] * H + h[None, :]
                mask = inside[:, None] & (h < H)[None, :]
                y, x = y * y_inverse[:, None], x * x_inverse[:, None]
                if grad_output_ptr is not None:
                    grad = by_error
                    if cosine:
                        grad += y_from_y[:, None] * y + y_from_x[:, None] * x
                    tl.store(grad_output_ptr + offsets, grad.to(grad_output_ptr.dtype.element_ty), mask=mask)
                if grad_target_ptr is not None:
                    grad = -by_error
                    if cosine:
                        grad += x_from_x[:, None] * x + x_from_y[:, None] * y
                    tl.store(grad_target_ptr + offsets, grad.to(grad_target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "chunk"], debug=True)
def _sum_kernel(values_ptr, root_ptr, sums_ptr, rmse_weight: tl.float64, N, chunk, BLOCK: tl.constexpr):
    """sums[i] is the sum of the i-th ``chunk`` of values (N,), in a fixed order, plus rmse_weight * root."""
    first = tl.program_id(0).to(tl.int64) * chunk
    last = tl.minimum(first + chunk, N)
    sums = tl.zeros((BLOCK,), values_ptr.dtype.element_ty)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(values_ptr + i, mask=i < last, other=0.0)
    total = tl.sum(sums, 0)
    if root_ptr is not None:
        total += tl.full((), rmse_weight, total.dtype) * tl.load(root_ptr)
    tl.store(sums_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["N"], debug=True)
def _root_kernel(largest_ptr, squares_ptr, root_ptr, N, BLOCK: tl.constexpr):
    """The root of sums of squares (N,), each relative to the square of its ``largest``; NaN propagates."""
    largest = tl.zeros((BLOCK,), squares_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(largest_ptr + i, mask=i < N, other=0.0))
    largest = tl.max(largest, 0)
    scale = tl.where(largest > 0, largest, 1.0)
    sums = tl.zeros((BLOCK,), squares_ptr.dtype.element_ty)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ratio = divide(tl.load(largest_ptr + i, mask=i < N, other=0.0), scale)
        sums += tl.load(squares_ptr + i, mask=i < N, other=0.0) * (ratio * ratio)
    tl.store(root_ptr, largest * square_root(tl.sum(sums, 0)))


def cosine_mse_forward(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    cosine_weight: float,
    mse_weight: float,
    rmse_weight: float,
    power_weight: float,
    alpha: float,
    eps: float,
    needs_output: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, grad_output and grad_target; a gradient that is not needed is empty.

    The arguments and results are those of ``reference.cosine_mse_forward``: output and target (N, H),
    row_weight and target_norm (N,) in the accumulation dtype, all of them contiguous.
    """
    N = output.shape[0]
    dtype = accumulation_dtype(output.dtype)
    loss = output.new_empty((N,) if reduction == NONE else (), dtype=dtype)
    grad_output = output.new_empty(output.shape if needs_output else (0,))
    grad_target = output.new_empty(output.shape if needs_target else (0,))
    if N == 0:
        return loss.fill_(math.nan if reduction == MEAN else 0.0), grad_output, grad_target
    if grad_loss is not None:
        grad_loss = grad_loss.to(dtype).contiguous()  # Autograd often expands it from a scalar.
    weights = (cosine_weight, mse_weight, rmse_weight, power_weight)
    with torch.cuda.device_of(output):
        for launch in forward_launches(
            output,
            target,
            row_weight,
            target_norm,
            grad_loss,
            reduction,
            weights,
            alpha,
            eps,
            loss,
            grad_output if needs_output else None,
            grad_target if needs_target else None,
        ):
            launch.run()
    return loss, grad_output, grad_target


def forward_launches(
    output: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    grad_loss: Tensor | None,
    reduction: int,
    weights: tuple[float, float, float, float],
    alpha: float,
    eps: float,
    loss: Tensor | None,
    grad_output: Tensor | None,
    grad_target: Tensor | None,
) -> list[Launch]:
    """Return the launches of cosine_mse_forward in order; a loss or gradient that is None is not computed."""
    N, H = output.shape
    cosine_weight, mse_weight, rmse_weight, power_weight = weights
    tile = row_tile_of(output.dtype, N, H)
    programs = cdiv(N, tile.BLOCK_N)
    launches: list[Launch] = []

    def sums(*size: int) -> Tensor:
        return output.new_empty(size, dtype=accumulation_dtype(output.dtype))

    weight_sums, row_scale = None, 1.0
    if reduction == MEAN and row_weight is None:
        row_scale = 1.0 / N
    elif reduction == MEAN:
        assert row_weight is not None
        chunk = cdiv(cdiv(N, _WEIGHT_SUMS), _WEIGHT_BLOCK) * _WEIGHT_BLOCK
        weight_sums = sums(cdiv(N, chunk))
        launches.append(_sum_launch(row_weight, None, weight_sums, 0.0, chunk, _WEIGHT_BLOCK))

    rows = dict(
        output_ptr=output,
        target_ptr=target,
        row_weight_ptr=row_weight,
        weight_sums_ptr=weight_sums,
        target_norm_ptr=target_norm,
        grad_loss_ptr=grad_loss,
        row_scale=row_scale,
        cosine_weight=cosine_weight,
        mse_weight=mse_weight / H,
        rmse_weight=rmse_weight / H,
        power_weight=power_weight / H,
        power_slope=power_weight * alpha / H,
        exponent=alpha - 1.0,
        eps=eps,
        N=N,
        weight_sums=0 if weight_sums is None else weight_sums.numel(),
        H=H,
        per_row=reduction == NONE,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_H=tile.BLOCK_H,
        PARTS=tile.PARTS,
        BLOCK_WEIGHTS=_WEIGHT_SUMS,
    )
    nothing = dict.fromkeys(
        ("root_ptr", "loss_ptr", "largest_ptr", "squares_ptr", "grad_output_ptr", "grad_target_ptr")
    )
    batch_root = rmse_weight != 0 and reduction == MEAN
    terms = dict(
        cosine=cosine_weight != 0,
        mse=mse_weight != 0,
        rmse=rmse_weight != 0 and not batch_root,
        power=None if power_weight == 0 else "linear" if alpha == 1 else "power",
    )
    no_terms = dict(cosine=False, mse=False, rmse=False, power=None)

    def add(arguments: dict[str, Any]) -> None:
        launches.append(Launch(_cosine_mse_kernel, (programs,), rows | nothing | arguments, tile.num_warps))

    partial = None if loss is None or reduction == NONE else sums(programs)
    results = dict(
        loss_ptr=loss if partial is None else partial,
        grad_output_ptr=grad_output,
        grad_target_ptr=grad_target,
    )
    root = None
    if batch_root:
        root = sums()
        parts = dict(largest_ptr=sums(programs), squares_ptr=sums(programs))
        one_pass = grad_output is None and grad_target is None
        add(terms | results | parts if one_pass else no_terms | parts)
        finish = dict(parts, root_ptr=root, N=programs, BLOCK=_ROOT_BLOCK)
        launches.append(Launch(_root_kernel, (1,), finish, num_warps=16))
        if not one_pass:
            add(terms | results | dict(root_ptr=root))
    else:
        add(terms | results)
    if loss is not None and partial is not None:
        launches.append(_sum_launch(partial, root, loss, rmse_weight, programs, _PARTIAL_BLOCK))
    return launches


def _sum_launch(
    values: Tensor, root: Tensor | None, sums: Tensor, rmse_weight: float, chunk: int, block: int
) -> Launch:
    arguments = dict(
        values_ptr=values,
        root_ptr=root,
        sums_ptr=sums,
        rmse_weight=rmse_weight,
        N=values.numel(),
        chunk=chunk,
        BLOCK=block,
    )
    return Launch(_sum_kernel, (sums.numel(),), arguments, num_warps=max(1, block // 512))
