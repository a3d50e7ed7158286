#include "cpu/simd/capability.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "checks.h"
#include "cpu/kernels/kernels.h"

#if defined(EMBKERN_X86_LEVELS)
#include <cpuid.h>
#endif

namespace embkern {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};
constexpr int64_t kLevels = 4;

// The highest level that the processor and the build have.
Capability best() {
#if defined(EMBKERN_X86_LEVELS)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;  // __builtin_cpu_supports("f16c") is missing from older compilers
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Cooper Lake has BF16 without VBMI and GFNI.
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  if (avx512_bf16) return Capability::avx512_bf16;
  if (avx512) return Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::portable;
}

void check_level(const char* source, int64_t level) {
  check(level >= 0 && level <= static_cast<int64_t>(best()), source, ": expected at most ",
        kNames[static_cast<int64_t>(best())], " on this processor, got ", kNames[level]);
}

int64_t initial() {
  const char* name = std::getenv("EMBKERN_CPU_CAPABILITY");
  if (!name || !*name) return static_cast<int64_t>(best());
  for (int64_t level = 0; level < kLevels; ++level) {
    if (std::string(name) == kNames[level]) {
      check_level("EMBKERN_CPU_CAPABILITY", level);
      return level;
    }
  }
  check(false, "EMBKERN_CPU_CAPABILITY: expected portable, avx2, avx512 or avx512_bf16, got ", name);
  return 0;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> level{initial()};
  return level;
}

}  // namespace

Capability capability() { return static_cast<Capability>(current().load(std::memory_order_relaxed)); }

int64_t cpu_capability(int64_t level) {
  if (level != -1) {
    check(level >= 0 && level < kLevels, "level: expected -1 to 3, got ", level);
    check_level("level", level);
    current().store(level);
  }
  return current().load();
}

// Returns the table of the level in use; every level's namespace has a function of that name.
#if defined(EMBKERN_X86_LEVELS)
#define EMBKERN_DISPATCH(table)       \
  switch (capability()) {             \
    case Capability::avx512_bf16:     \
      return avx512_bf16::table<T>(); \
    case Capability::avx512:          \
      return avx512::table<T>();      \
    case Capability::avx2:            \
      return avx2::table<T>();        \
    default:                          \
      return portable::table<T>();    \
  }
#else
#define EMBKERN_DISPATCH(table) return portable::table<T>();
#endif

template <class T>
const Kernels<T>& kernels() {
  EMBKERN_DISPATCH(kernels)
}

template <class T>
const TrainingKernels<T>& training_kernels() {
  EMBKERN_DISPATCH(training_kernels)
}

template <class T>
const PackingKernels& packing_kernels() {
  EMBKERN_DISPATCH(packing_kernels)
}

template const PackingKernels& packing_kernels<float>();
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();
template const TrainingKernels<float>& training_kernels<float>();
template const TrainingKernels<double>& training_kernels<double>();

}  // namespace embkern
