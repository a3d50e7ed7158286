// Compiler-specific attributes, pragmas and builtins.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define EMBKERN_INLINE inline __attribute__((always_inline))
#else
#define EMBKERN_INLINE inline
#endif

// Unrolls the loop that follows; its bounds are constants.
#if defined(__GNUC__) && !defined(__clang__)
#define EMBKERN_UNROLL _Pragma("GCC unroll 32")
#elif defined(__clang__)
#define EMBKERN_UNROLL _Pragma("unroll")
#else
#define EMBKERN_UNROLL
#endif

namespace embkern {

// Prefetches every cache line of a range. LOCALITY as in __builtin_prefetch: 3 means all caches, 2 means L2.
template <int WRITE = 0, int LOCALITY = 3>
EMBKERN_INLINE void prefetch(const void* begin, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + at, WRITE, LOCALITY);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace embkern
