"""Device functions that the kernels share: powers, correctly rounded quotients and roots, scales of rows."""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a jit function.)

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import reference

POWER_BIAS = tl.constexpr(reference.POWER_BIAS)
# Sums of squares within these bounds need no scale: squares that underflow are negligible beside them.
_ORDINARY_FP32 = tl.constexpr((2.0**-64, 2.0**64))
_ORDINARY_FP64 = tl.constexpr((2.0**-512, 2.0**512))


@triton.jit
def _high_bits(x):
    """The upper 12 bits of fp32 mantissas: products of two such values are exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _two_to_the(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_fp32(u, exponent):
    """``u ** exponent`` for normal fp32 u > 0, to about an ulp.

    2^(exponent * log2(u)) with the logarithm as the sum of two fp32 numbers. With one, or with the hardware's
    approximate logarithm, the relative error is 1e-6 where u is small. Products that have to be exact have
    factors of 12 bits. These are 55 instructions, none of them in the special function unit.
    """
    # u = m 2^k with m in [sqrt(1/2), sqrt(2)), f = m - 1
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) = f - f^2/2 + f^3 R(f), as g + low. The minimax R is good for 2^-29.
    f_high = _high_bits(f)
    half_square = 0.5 * f_high * f_high
    g = f - half_square
    remainder = -0.0763545447
    remainder = remainder * f + 0.128546252
    remainder = remainder * f - 0.132058133
    remainder = remainder * f + 0.141898691
    remainder = remainder * f - 0.166167645
    remainder = remainder * f + 0.20001636
    remainder = remainder * f - 0.250010513
    remainder = remainder * f + 0.333333277
    low = (f - g) - half_square - 0.5 * (f - f_high) * (f + f_high) + f * f * f * remainder
    # log2(u) = k + log(1 + f) / log(2), as logarithm + low; 1 / log(2) = 1.4423828125 (12 bits) + ...
    g_high = _high_bits(g)
    product = 1.4423828125 * g_high
    # Adding 1.5 * 2^23 converts between integers and floats, and rounds a float to an integer.
    whole = (k + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    logarithm = whole + product
    low = 1.4423828125 * (g - g_high) + 0.00031222839606925845 * g + 1.4426950408889634 * low
    low += product - (logarithm - whole)
    # 2^(n + r): a polynomial for r in [-1/2, 1/2], and n in two halves, as it may exceed an exponent of fp32.
    exponent_high = _high_bits(exponent)
    logarithm_high = _high_bits(logarithm)
    t = exponent_high * logarithm_high
    t_low = (
        exponent_high * (logarithm - logarithm_high) + (exponent - exponent_high) * logarithm + exponent * low
    )
    t = tl.minimum(tl.maximum(t, -300.0), 300.0)
    shifted = t + 12582912.0
    n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    r = (t - (shifted - 12582912.0)) + t_low
    result = 0.000153456969 * r + 0.00134000633
    result = result * r + 0.0096184904
    result = result * r + 0.0555032845
    result = result * r + 0.240226469
    result = result * r + 0.693147206
    result = result * r + 1.0
    half = n >> 1
    return result * _two_to_the(half) * _two_to_the(n - half)


@triton.jit
def error_power(e, exponent, element: tl.constexpr):
    """``(|e| + 1e-10) ** exponent``."""
    u = tl.abs(e) + POWER_BIAS
    # Rounding 16-bit rows has a hundred times the error of the fast fp32 functions; fp64 ones are exact.
    return _power_fp32(u, exponent) if element == tl.float32 else tl.exp2(exponent * tl.log2(u))


@triton.jit
def divide(a, b):
    """``a / b`` rounded to nearest; ``/`` of fp32 has an error of up to two ulps."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(a):
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def inverse_scale(largest):
    """2^-k for a largest entry of about 2^k, with k clamped so that 2^k and 2^-k are normal numbers."""
    if largest.dtype == tl.float64:
        exponent = largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        exponent = tl.minimum(tl.maximum(exponent, 1 << 52), 2045 << 52)
        inverse = ((2046 << 52) - exponent).to(tl.float64, bitcast=True)
    else:
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return inverse


@triton.jit
def out_of_range(squares):
    """Whether a sum of squares may have left the range in which it is accurate."""
    if squares.dtype == tl.float64:
        outside = (squares < _ORDINARY_FP64[0]) | (squares > _ORDINARY_FP64[1])
    else:
        outside = (squares < _ORDINARY_FP32[0]) | (squares > _ORDINARY_FP32[1])
    return outside


@triton.jit
def append(parts, part):
    return parts + (part,)  # noqa: RUF005 (Triton has no starred expressions)
