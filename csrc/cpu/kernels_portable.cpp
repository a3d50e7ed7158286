// The kernels in the compiler's own vectors: SSE2 on x86-64, NEON on AArch64, plain code elsewhere.
#include "cpu/kernels.h"
#include "cpu/kernels_headers.h"

#define EMBKERN_LEVEL portable
#include "cpu/kernels.inl"
