"""What the kernels of the cross-entropy share: blocks of operands, exponentials, capped logits."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit function.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.reference.cross_entropy import Head

INFINITY = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950216293335)  # in fp32, and what is missing to log2(e)
_LOG2_E_REST = tl.constexpr(1.925963033500949e-08)
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_of(tensor_ptr, i, k, count, K: tl.constexpr):
    """Rows ``i`` and columns ``k`` of a tensor (count, K), zero outside it."""
    mask = (i < count)[:, None] & (k < K)[None, :]
    return tl.load(tensor_ptr + i.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def products(
    left,
    left_ptr,
    right_ptr,
    i,
    j,
    left_count,
    right_count,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    accumulator: tl.constexpr,
):
    """``left[i] @ right[j].T`` (BLOCK_I, BLOCK_J); ``left`` is the block of i if BLOCK_K covers K."""
    element = left.dtype
    sums = tl.zeros((BLOCK_I, BLOCK_J), accumulator)
    k = tl.arange(0, BLOCK_K)
    if K <= BLOCK_K:
        right = block_of(right_ptr, j, k, right_count, K).to(element)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee", out_dtype=accumulator)
    else:
        for start in range(0, K, BLOCK_K):
            some = block_of(left_ptr, i, start + k, left_count, K).to(element)
            right = block_of(right_ptr, j, start + k, right_count, K).to(element)
            sums = tl.dot(some, tl.trans(right), sums, input_precision="ieee", out_dtype=accumulator)
    return sums


@triton.jit
def exponential(x, element: tl.constexpr):
    """``exp(x)`` for x of at most about 0, -inf and NaN included.

    The product with log2(e) is rounded, which costs |x| / 2 ulps of the result; beside rounded 16-bit
    operands that is nothing, for fp32 ones its error is taken into account.
    """
    if element == tl.float32:
        x = tl.where(x < -104.0, -104.0, x)  # exp is 0; -inf would turn into NaN
        power = x * _LOG2_E
        low = tl.fma(x, tl.full((), _LOG2_E, tl.float32) + tl.zeros_like(x), -power) + x * _LOG2_E_REST
        result = tl.exp2(power)
        result += result * (low * _LOG_2)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def hyperbolic_tangent(x, element: tl.constexpr):
    """``tanh(x)``; its relative error is that of fp32 where operands are, else the absolute one."""
    magnitude = tl.abs(x)
    e = exponential(-2.0 * magnitude, element)
    result = (1.0 - e) / (1.0 + e)
    result = tl.where(x < 0, -result, result)
    if element == tl.float32:
        square = x * x  # 1 - e cancels for a small x: minimax polynomial for (tanh(x) / x - 1) / x^2
        series = -0.005895146 * square + 0.020795962
        series = series * square - 0.053783827
        series = series * square + 0.13331924
        series = series * square - 0.333332980
        result = tl.where(magnitude < 0.6, x + x * (square * series), result)
    return result


@triton.jit
def capped_logits(sums, constant, bias, cap, inverse_cap, element: tl.constexpr, CAPPED: tl.constexpr):
    """Logits of products, and over the cap if there is one; constant and bias are None or broadcast."""
    if constant is not None:
        sums += constant
    if bias is not None:
        sums += bias
    tangent = sums
    if CAPPED:
        tangent = hyperbolic_tangent(sums * inverse_cap, element)
        sums = cap * tangent
    return sums, tangent


def label_places(head: Head) -> Tensor:
    """Return the labels (N,) int32, -1 where they are ignored."""
    return head.labels.masked_fill(head.ignored(), -1).to(torch.int32).contiguous()
