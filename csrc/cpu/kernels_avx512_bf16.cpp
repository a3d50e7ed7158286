// The kernels for AVX-512 with bf16 dot products, VBMI and GFNI, which processors since Ice Lake's successors
// and Zen 4 have together. Headers come first: what they define must run everywhere.
#include "cpu/kernels.h"
#include "cpu/kernels_headers.h"

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
#define EMBKERN_AVX512 1
#define EMBKERN_AVX512_BF16 1
#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
