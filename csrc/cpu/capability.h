// The instruction sets that the CPU kernels are compiled for, and the one in use.
#pragma once

#include <cstdint>

namespace embkern {

// In ascending order; a level includes those below it.
enum class Capability : int64_t { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best level of this processor, or the lower one that was asked for.
Capability capability();

// Sets the level and returns it; -1 leaves it as it is. The name EMBKERN_CPU_CAPABILITY=avx2 (read at first
// use) does the same. Throws std::invalid_argument if the processor or the build lacks the level.
int64_t cpu_capability(int64_t level);

}  // namespace embkern
