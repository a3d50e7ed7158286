"""The Gram form of autoencoder_loss: every sum in r dimensions, with no reconstruction.

With ``c`` the codes and a one, ``D`` the basis and the offset below it, ``P = target @ D^T``, ``G = D D^T``
and ``Q = c G``, every sum over H of a row x and of its reconstruction ``y = c D`` is

    <x, y> = c.P      |y|^2 = c.Q      |x - y|^2 = |x|^2 - 2 c.P + c.Q

and the gradient of its loss with respect to y is ``s y + t x``, two numbers per row, hence

    grad of codes     s Q + t P
    grad of D         (c^T diag(s) c) D + (t c)^T target
    grad of encoder   (grad of codes)^T target

This takes two products over the table, ``target @ [encoder_weight; D]^T`` and ``[grad_codes, t c]^T @
target``, and O(N r) memory: eight times (N, r) in fp32, or six without an encoder; five and three for bf16.
Neither y nor its gradient exists.

**Cancellation.** The |x - y|^2 of a row has a relative error of about 2^-24 * m / |x - y|^2, where
``m = |x|^2 + sum_j c_j^2 G_jj`` is the size of the terms that are subtracted. Where |x - y|^2 falls below
m / 100, or |y|^2 below a hundredth of the squares that it is the sum of, the sums of that row are taken again
over H from y itself, block by block on chip; a block without such a row skips this. The squared error of a
row is thus within 1e-5 of its value at any fit, and the mean within 1e-6. A known ``target_norm`` saves a
read of the target and adds the rounding of its square, 2^-23 |x|^2, at most 1.2e-5 of |x - y|^2.

The gradients keep the form ``s y + t x``, with s and t from those sums. For fp32, the tensors in r dimensions
alone (G, Q and ``c^T diag(s) c``) are fp64, so that an ill-conditioned basis adds no error; the rounding of P
and of ``(t c)^T target`` remains. A sum of n products in fp32 has an error within sqrt(n) u |a| |b| in any
order (u = 2^-24; in root mean square). In Frobenius norms and in addition to one rounding of the results,

    error of grad of codes     <=  sqrt(H) u max|t| |target| |D|
    error of grad of basis     <=  (sqrt(N) + 1) u |t c| |target|

which grows, like plain torch's error, as the inverse of the fit ``f = |x - y| / |x|``. The share of this
bound that a processor reaches depends on the order of its sums: 3 to 8 % at 256 x 96 and rank 12, the most
where terms are added one by one. Plain torch instead rounds y, a sum over r terms. At that shape and a basis
of condition 1 our error was 5 to 9 times torch's with sums in blocks, up to 16 times with sums one by one;
for a basis of condition 100 it was no greater. Near the optimum it was 4e-7 / f to 5e-7 / f for codes and
basis and 1e-6 / f for the offset. There plain torch has 2e-7 / f and 3e-7 / f for a basis of condition 1, as
much as ours for one of 30, and 1e-5 / f for one of 1000 (2048 x 768, rank 75, fp32 products on CPU, f from
0.7 to 0.01).
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

# Below this share of the terms that are subtracted, a row is summed over H again. Measured with fp32 products
# on CPU: at this share the error of the Gram form is 3e-6 for a row and 1e-6 for the mean over 2048 rows.
_SAFE_SHARE = tl.constexpr(0.01)
# Rows, columns and ranks per program or step, chosen by arithmetic and the compiler's report (no spills).
_GRAM_SUMS_TILE = dict(BLOCK_N=16, BLOCK_H=64, BLOCK_R=64)
_GRADIENTS_TILE = (16, 64)
# Columns are padded to a multiple of this: 16 bytes of bf16, so that every row of every operand is aligned.
ALIGNMENT = 8
# By arithmetic, not measured. Below 2048 rows the launches cost more than the products. Beyond a rank of H /
# 2.5 the products in r dimensions cost as much as the product that they save (fp64 is as fast as fp32 on A100
# and H100, half as fast on B200, a 64th on consumer devices). For bf16 they are fp32 products in place of
# tensor-core ones, which moves the bound to H / 6.
_GRAM_ROWS = 2048
_GRAM_RANKS = {torch.bfloat16: 6.0, torch.float32: 2.5, torch.float64: 2.5}


def gram_pays(target: Tensor, r: int) -> bool:
    """Whether the Gram form is the faster one."""
    ranks = _GRAM_RANKS.get(target.dtype)
    return ranks is not None and target.shape[0] >= _GRAM_ROWS and 0 < ranks * r <= target.shape[1]


@triton.jit(do_not_specialize=["N"])
def _gram_sums_kernel(
    codes_ptr,
    products_ptr,
    gram_products_ptr,
    gram_ptr,
    target_ptr,
    target_norm_ptr,
    rows_ptr,
    N,
    CODES_STRIDE: tl.constexpr,
    PRODUCTS_STRIDE: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sums of the rows, (N, 4): |x|^2, <x, y>, |y|^2, and |x - y|^2, which is NaN where it is unsafe."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    dot = tl.zeros((BLOCK_N,), tl.float64)
    yy, parts, xx = dot, dot, dot
    for start in range(0, R, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R)
        mask = inside[:, None] & (k < R)[None, :]
        c = tl.load(codes_ptr + n[:, None] * CODES_STRIDE + k[None, :], mask=mask, other=0.0).to(tl.float64)
        p = tl.load(products_ptr + n[:, None] * PRODUCTS_STRIDE + k[None, :], mask=mask, other=0.0)
        q = tl.load(gram_products_ptr + n[:, None] * R + k[None, :], mask=mask, other=0.0)
        g = tl.load(gram_ptr + k * (R + 1), mask=k < R, other=0.0)
        dot += tl.sum(c * p.to(tl.float64), 1)
        yy += tl.sum(c * q.to(tl.float64), 1)
        parts += tl.sum(c * c * g.to(tl.float64)[None, :], 1)
    if target_norm_ptr is None:
        for start in range(0, H, BLOCK_H):
            x = tile_of_rows(target_ptr, n, start + tl.arange(0, BLOCK_H), inside, H).to(tl.float64)
            xx += tl.sum(x * x, 1)
    else:
        norm = tl.load(target_norm_ptr + n, mask=inside, other=0.0).to(tl.float64)
        xx = norm * norm
    ee = xx - 2 * dot + yy
    # A product beyond the range of fp32 makes ee infinite, although y itself may be in range. The tensor is
    # the left factor, because the interpreters of Triton 3.7 and 3.8 do not multiply the other way.
    safe = (ee >= (xx + parts) * _SAFE_SHARE) & (yy >= parts * _SAFE_SHARE) & (ee < float("inf"))
    rows = rows_ptr + 4 * n
    tl.store(rows, xx, mask=inside)
    tl.store(rows + 1, dot, mask=inside)
    tl.store(rows + 2, yy, mask=inside)
    tl.store(rows + 3, tl.where(safe, ee, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _row_losses_kernel(
    rows_ptr,
    codes_ptr,
    decoder_ptr,
    target_ptr,
    row_weight_ptr,
    slopes_ptr,
    sums_ptr,
    cosine_weight: tl.float64,
    mse_weight: tl.float64,
    root_weight: tl.float64,
    eps: tl.float64,
    N,
    CODES_STRIDE: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over a block of rows; unsafe rows are first summed over H, from y itself.

    ``slopes`` (N, 2) receives s and t of cosine, squared error and root of the row. The division by the sum
    of the weights and the root of the batch are not known yet and follow in _row_gradients_kernel.
    """
    accumulator: tl.constexpr = codes_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    rows = rows_ptr + 4 * n
    xx = tl.load(rows, mask=inside, other=0.0)
    dot = tl.load(rows + 1, mask=inside, other=0.0)
    yy = tl.load(rows + 2, mask=inside, other=0.0)
    ee = tl.load(rows + 3, mask=inside, other=0.0)
    unsafe = ee != ee
    if tl.max(unsafe.to(tl.int32), 0) > 0:
        exact_dot = tl.zeros((BLOCK_N,), tl.float64)
        exact_yy, exact_ee = exact_dot, exact_dot
        for first in range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            y = tl.zeros((BLOCK_N, BLOCK_H), accumulator)
            for start in range(0, R, BLOCK_R):
                k = start + tl.arange(0, BLOCK_R)
                mask = inside[:, None] & (k < R)[None, :]
                c = tl.load(codes_ptr + n[:, None] * CODES_STRIDE + k[None, :], mask=mask, other=0.0)
                mask = (k < R)[:, None] & (h < H)[None, :]
                d = tl.load(decoder_ptr + k[:, None] * H + h[None, :], mask=mask, other=0.0)
                y = tl.dot(c, d, y, input_precision="ieee", out_dtype=accumulator)
            x = tile_of_rows(target_ptr, n, h, inside, H).to(accumulator)
            e = (x - y).to(tl.float64)
            y = y.to(tl.float64)
            exact_dot += tl.sum(x.to(tl.float64) * y, 1)
            exact_yy += tl.sum(y * y, 1)
            exact_ee += tl.sum(e * e, 1)
        dot = tl.where(unsafe, exact_dot, dot)
        yy = tl.where(unsafe, exact_yy, yy)
        ee = tl.where(unsafe, exact_ee, ee)

    weight = row_weights(row_weight_ptr, n, inside)
    cosine, norms, clamped = row_cosine(dot, xx, yy, eps)
    mse = ee / H
    root = tl.sqrt(mse)
    store_sums(sums_ptr, weight, cosine, mse, root, tl.zeros_like(root), inside)
    if slopes_ptr is not None:
        error = 2 * mse_weight / H + tl.where(root == 0, 0.0, root_weight / (H * root))
        s = error + tl.where(clamped, 0.0, cosine_weight * cosine / yy)
        t = -error - cosine_weight / norms
        tl.store(slopes_ptr + 2 * n, weight * s, mask=inside)
        tl.store(slopes_ptr + 2 * n + 1, weight * t, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _row_gradients_kernel(
    codes_ptr,
    products_ptr,
    gram_products_ptr,
    row_weight_ptr,
    slopes_ptr,
    totals_ptr,
    grad_codes_ptr,
    left_ptr,
    N,
    CODES_STRIDE: tl.constexpr,
    PRODUCTS_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    LEFT_STRIDE: tl.constexpr,
    GRAD_RANKS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the gradient ``s Q + t P`` of the codes, ``t c`` into the left factor, and ``s c`` over Q."""
    R_TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    n = (tl.program_id(0) // R_TILES).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % R_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = n < N
    scale, batch_root = tl.load(totals_ptr), tl.load(totals_ptr + 1)
    from_root = row_weights(row_weight_ptr, n, inside) * batch_root
    s = (tl.load(slopes_ptr + 2 * n, mask=inside, other=0.0) + from_root) * scale
    t = (tl.load(slopes_ptr + 2 * n + 1, mask=inside, other=0.0) - from_root) * scale
    s, t = s[:, None], t[:, None]

    mask = inside[:, None] & (k < R)[None, :]
    c = tl.load(codes_ptr + n[:, None] * CODES_STRIDE + k[None, :], mask=mask, other=0.0).to(tl.float64)
    p = tl.load(products_ptr + n[:, None] * PRODUCTS_STRIDE + k[None, :], mask=mask, other=0.0)
    gram_products = gram_products_ptr + n[:, None] * R + k[None, :]
    q = tl.load(gram_products, mask=mask, other=0.0)
    grad = s * q.to(tl.float64) + t * p.to(tl.float64)
    grads = grad_codes_ptr + n[:, None] * GRAD_STRIDE + k[None, :]
    tl.store(grads, grad.to(grad_codes_ptr.dtype.element_ty), mask=mask & (k < GRAD_RANKS)[None, :])
    left = left_ptr + n[:, None] * LEFT_STRIDE + k[None, :]
    tl.store(left, (t * c).to(left_ptr.dtype.element_ty), mask=mask)
    tl.store(gram_products, (s * c).to(gram_products_ptr.dtype.element_ty), mask=mask)


def loss_by_gram(
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
    # Columns of the codes from r on are ones; row r of D is the offset, the rows after it are zeros.
    width = cdiv(r + (offset is not None), ALIGNMENT) * ALIGNMENT
    zeros = target.new_zeros(ALIGNMENT, H)
    rows = [basis, zeros[: width - r]] if offset is None else [basis, offset[None], zeros[: width - r - 1]]
    if encoder_weight is None:
        assert codes is not None
        decoder = basis if width == r else torch.cat(rows)
        products = product(target, decoder.t())
        codes = codes.to(work)
        codes = codes if width == r else F.pad(codes, (0, width - r), value=1.0)
    else:
        weight = torch.cat([encoder_weight, zeros[: width - r], *rows])
        constant = target.new_zeros(2 * width, dtype=work)
        constant[r:width] = 1.0
        if encoder_bias is not None:
            constant[:r] = encoder_bias
        both = torch.addmm(constant, target, weight.t()) if dtype == work else product(target, weight.t())
        if dtype != work:
            both += constant
        decoder, codes, products = weight[width:], both[:, :width], both[:, width:]
    decoder = decoder.to(work)
    # Products in r dimensions are fp64, so that they add no error to those over the table. For 16-bit tables
    # fp32 suffices.
    inner = work if dtype.itemsize == 2 else torch.float64
    inner_codes, inner_decoder = codes.to(inner), decoder.to(inner)
    gram = inner_decoder @ inner_decoder.t()
    gram_products = inner_codes @ gram

    launches, sums, slopes = row_losses_launches(
        target, codes, products, gram_products, gram, decoder, row_weight, target_norm, options, needs_grad
    )
    for launch in launches:
        launch.run()
    finish, terms, totals = finish_launch(sums, H, work, options)
    finish.run()
    grads = [target.new_empty(0) for _ in range(5)]
    if needs_grad:
        assert slopes is not None
        encoded = encoder_weight is not None
        left = target.new_empty(N, (1 + encoded) * width)
        grad_codes = left[:, :width] if encoded else target.new_empty(N, r)
        row_gradients_launch(
            codes,
            products,
            gram_products,
            row_weight,
            slopes,
            totals,
            grad_codes,
            left[:, -width:],
        ).run()
        from_target = product(left.t(), target)
        weighted_gram = gram_products.t() @ inner_codes
        grad_decoder = torch.addmm(from_target[-width:].to(inner), weighted_gram, inner_decoder)
        if encoded:
            grads[1] = _own_rows(from_target, 0, r, dtype)
            if encoder_bias is not None:
                grads[2] = grad_codes[:, :r].sum(0, dtype=work).to(dtype)
        else:
            grads[0] = grad_codes
        grads[3] = _own_rows(grad_decoder, 0, r, dtype)
        if offset is not None:
            grads[4] = _own_rows(grad_decoder, r, 1, dtype).view(H)
    return terms, *grads  # type: ignore[return-value]


def _own_rows(rows: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Copy rows to their own memory, because the outputs of an op must not share any."""
    return rows[first : first + count].to(dtype, copy=count < len(rows))


def row_losses_launches(
    target: Tensor,
    codes: Tensor,
    products: Tensor,
    gram_products: Tensor,
    gram: Tensor,
    decoder: Tensor,
    row_weight: Tensor | None,
    target_norm: Tensor | None,
    options: Options,
    needs_grad: bool,
) -> tuple[list[Launch], Tensor, Tensor | None]:
    """Return the launches of the row sums, the sums per program, and s and t per row (N, 2)."""
    N, H = target.shape
    gram_tile, (tile, num_warps) = _GRAM_SUMS_TILE, _row_losses_tile(codes.dtype, H)
    programs = cdiv(N, tile["BLOCK_N"])
    rows = target.new_empty((N, 4), dtype=torch.float64)
    sums = target.new_empty((programs, SUMS.value), dtype=torch.float64)
    slopes = target.new_empty((N, 2), dtype=torch.float64) if needs_grad else None
    shared = dict(
        rows_ptr=rows,
        codes_ptr=codes,
        target_ptr=target,
        N=N,
        CODES_STRIDE=codes.stride(0),
        R=decoder.shape[0],
        H=H,
    )
    by_gram = dict(
        shared,
        products_ptr=products,
        gram_products_ptr=gram_products,
        gram_ptr=gram,
        target_norm_ptr=target_norm,
        PRODUCTS_STRIDE=products.stride(0),
        **gram_tile,
    )
    losses = dict(
        shared,
        decoder_ptr=decoder,
        row_weight_ptr=row_weight,
        slopes_ptr=slopes,
        sums_ptr=sums,
        cosine_weight=options.cosine_weight,
        mse_weight=options.mse_weight,
        root_weight=options.rmse_weight if options.reduction == reference.SUM else 0.0,
        eps=options.eps,
        **tile,
    )
    launches = [
        Launch(_gram_sums_kernel, (cdiv(N, gram_tile["BLOCK_N"]),), by_gram, num_warps=4),
        Launch(_row_losses_kernel, (programs,), losses, num_warps, num_stages=2),
    ]
    return launches, sums, slopes


def _row_losses_tile(dtype: torch.dtype, H: int) -> tuple[dict[str, int], int]:
    """Return blocks and warps, bounded by registers: unaligned rows are loaded element by element."""
    if dtype == torch.float64:
        return dict(BLOCK_N=16, BLOCK_H=16, BLOCK_R=16), 4
    if H % ALIGNMENT:
        return dict(BLOCK_N=16, BLOCK_H=32, BLOCK_R=16), 4
    return dict(BLOCK_N=32, BLOCK_H=64, BLOCK_R=16), 8


def row_gradients_launch(
    codes: Tensor,
    products: Tensor,
    gram_products: Tensor,
    row_weight: Tensor | None,
    slopes: Tensor,
    totals: Tensor,
    grad_codes: Tensor,
    left: Tensor,
) -> Launch:
    """Return the launch that stores grad_codes (N, r or wider), ``t c`` into left and ``s c`` over Q."""
    N, R = gram_products.shape
    block_n, block_r = _GRADIENTS_TILE
    arguments = dict(
        codes_ptr=codes,
        products_ptr=products,
        gram_products_ptr=gram_products,
        row_weight_ptr=row_weight,
        slopes_ptr=slopes,
        totals_ptr=totals,
        grad_codes_ptr=grad_codes,
        left_ptr=left,
        N=N,
        CODES_STRIDE=codes.stride(0),
        PRODUCTS_STRIDE=products.stride(0),
        GRAD_STRIDE=grad_codes.stride(0),
        LEFT_STRIDE=left.stride(0),
        GRAD_RANKS=grad_codes.shape[1],
        R=R,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
    )
    grid = (cdiv(N, block_n) * cdiv(R, block_r),)
    return Launch(_row_gradients_kernel, grid, arguments, num_warps=4)
