// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

#include <cstdint>

namespace embkern {

// In ascending order; each level includes those below it. avx2 includes FMA and F16C. avx512 means F, BW, DQ
// and VL. avx512_bf16 adds BF16, VBMI and GFNI.
enum class Capability : int64_t { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The level in use: the processor's best unless a lower one was set.
Capability capability();

// Sets the level and returns it; -1 only returns it. EMBKERN_CPU_CAPABILITY=avx2, which is read at the first
// use, sets it by name. Throws std::invalid_argument if the processor or the build lacks the level.
int64_t cpu_capability(int64_t level);

}  // namespace embkern
