// The kernels for AVX2, FMA and F16C.
#include "cpu/simd/headers.h"

#if defined(EMBKERN_X86_LEVELS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define EMBKERN_LEVEL avx2
#define EMBKERN_PRIMITIVES "cpu/simd/avx2.inl"
#include "cpu/kernels/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
