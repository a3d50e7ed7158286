// The kernels for AVX-512 with BF16, VBMI and GFNI, as in Sapphire Rapids and Zen 4.
#include "cpu/simd/headers.h"

#if defined(EMBKERN_X86_LEVELS)
#if defined(__clang__)
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,gfni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,gfni")
#endif

#define EMBKERN_LEVEL avx512_bf16
#define EMBKERN_PRIMITIVES "cpu/simd/avx512_bf16.inl"
#include "cpu/kernels/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
