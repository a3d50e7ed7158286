"""What both forms of the loss share: arguments, the sums over rows, and the terms computed from them."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit kernel: only constants and fp64 scalars have one.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import reference
from ..launch import Launch

# Sums over rows that a program stores: of the weights, cosine distances, squared errors, roots and powers.
SUMS = tl.constexpr(5)
# The number of programs whose sums one step of _finish_kernel adds.
_FINISH_BLOCK = 512


class Options(NamedTuple):
    """The scalars of the loss, in the order of the schema."""

    reduction: int
    cosine_weight: float
    mse_weight: float
    rmse_weight: float
    power_weight: float
    alpha: float
    eps: float


class Model(NamedTuple):
    """The parameters, in the order of the schema."""

    codes: Tensor | None
    encoder_weight: Tensor | None
    encoder_bias: Tensor | None
    basis: Tensor
    offset: Tensor | None


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, accumulated and returned in fp32 for 16-bit operands."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # In the interpreter: exact products, sums in fp32.


@triton.jit
def tile_of_rows(rows_ptr, n, h, inside, H: tl.constexpr):
    """Rows ``n`` and columns ``h``, zero outside."""
    return tl.load(rows_ptr + n[:, None] * H + h[None, :], mask=inside[:, None] & (h < H)[None, :], other=0.0)


@triton.jit
def row_weights(row_weight_ptr, n, inside):
    """The weights of the rows: 0 for rows beyond the last, 1 for all others if no weights are given."""
    if row_weight_ptr is None:
        weight = inside.to(tl.float64)
    else:
        weight = tl.load(row_weight_ptr + n, mask=inside, other=0.0).to(tl.float64)
    return weight


@triton.jit
def row_cosine(dot, xx, yy, eps):
    """Cosine, the product of the norms clamped to eps, and whether it was clamped."""
    norms = tl.sqrt(xx) * tl.sqrt(yy)
    clamped = norms < eps
    norms = tl.where(clamped, eps, norms)
    return dot / norms, norms, clamped


@triton.jit
def store_sums(sums_ptr, weight, cosine, mse, root, power, inside):
    """Store the sums of this program over its rows. Rows beyond the last have weight 0."""
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(sums, tl.sum(weight, 0))
    tl.store(sums + 1, tl.sum(tl.where(inside, weight * (1 - cosine), 0.0), 0))
    tl.store(sums + 2, tl.sum(weight * mse, 0))
    tl.store(sums + 3, tl.sum(weight * root, 0))
    tl.store(sums + 4, tl.sum(tl.where(inside, weight * power, 0.0), 0))


@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(
    sums_ptr,
    terms_ptr,
    totals_ptr,
    cosine_weight: tl.float64,
    mse_weight: tl.float64,
    rmse_weight: tl.float64,
    power_weight: tl.float64,
    programs,
    H: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the programs' sums in a fixed order: the four terms, and two factors of all rows' gradients.

    ``totals`` receives the factor of the sum (1, or 1 over the sum of the weights) and the slope of the root
    of the batch, d (rmse_weight * root) / d (sum of squares / 2) per unit of weight.
    """
    weight = tl.zeros((BLOCK,), tl.float64)
    distance, mse, root, power = weight, weight, weight, weight
    for start in range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        sums, mask = sums_ptr + i * SUMS, i < programs
        weight += tl.load(sums, mask=mask, other=0.0)
        distance += tl.load(sums + 1, mask=mask, other=0.0)
        mse += tl.load(sums + 2, mask=mask, other=0.0)
        root += tl.load(sums + 3, mask=mask, other=0.0)
        power += tl.load(sums + 4, mask=mask, other=0.0)
    scale = 1 / tl.sum(weight, 0) if MEAN else 1.0
    total_distance, total_mse = tl.sum(distance, 0) * scale, tl.sum(mse, 0) * scale
    total_power = tl.sum(power, 0) * scale
    batch_root = tl.sqrt(total_mse) if MEAN else tl.sum(root, 0)
    # A term of weight 0 does not count, even if its value is NaN.
    loss = tl.where(cosine_weight == 0, 0.0, cosine_weight * total_distance)
    loss += tl.where(mse_weight == 0, 0.0, mse_weight * total_mse)
    loss += tl.where(rmse_weight == 0, 0.0, rmse_weight * batch_root)
    loss += tl.where(power_weight == 0, 0.0, power_weight * total_power)
    element = terms_ptr.dtype.element_ty
    tl.store(terms_ptr, loss.to(element))
    tl.store(terms_ptr + 1, total_distance.to(element))
    tl.store(terms_ptr + 2, total_mse.to(element))
    tl.store(terms_ptr + 3, total_power.to(element))
    slope = tl.where((rmse_weight == 0) | (batch_root == 0), 0.0, rmse_weight / (H * batch_root))
    tl.store(totals_ptr, scale)
    tl.store(totals_ptr + 1, slope if MEAN else 0.0)


def finish_launch(
    sums: Tensor, H: int, dtype: torch.dtype, options: Options
) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch that adds the programs' sums, the terms (4,) and the factors of all rows (2,)."""
    terms, totals = sums.new_empty(4, dtype=dtype), sums.new_empty(2)
    arguments = dict(
        sums_ptr=sums,
        terms_ptr=terms,
        totals_ptr=totals,
        cosine_weight=options.cosine_weight,
        mse_weight=options.mse_weight,
        rmse_weight=options.rmse_weight,
        power_weight=options.power_weight,
        programs=sums.shape[0],
        H=H,
        MEAN=options.reduction == reference.MEAN,
        BLOCK=_FINISH_BLOCK,
    )
    return Launch(_finish_kernel, (1,), arguments, num_warps=4), terms, totals
