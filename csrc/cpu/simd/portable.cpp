// The kernels in the compiler's generic vectors: SSE2 on x86-64, NEON on AArch64, plain code elsewhere.
#include "cpu/simd/headers.h"

#define EMBKERN_LEVEL portable
#define EMBKERN_PRIMITIVES "cpu/simd/portable.inl"
#include "cpu/kernels/kernels.inl"
