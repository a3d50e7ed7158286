// How the CPU ops divide work between threads, and where large outputs come from.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/common.h"

namespace embkern {

constexpr int64_t kThreadWork = 50000;  // multiplications that are worth another thread: some 2 us
constexpr int64_t kHugePageBytes = 2 << 20;
// From here on glibc maps every allocation afresh and returns it at once.
constexpr int64_t kMappedBytes = 32 << 20;

// Runs body(task) for every task; threads take the next one as they become free. Results do not depend on it.
template <class Body>
void for_tasks(int64_t tasks, int64_t threads, Body body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  });
}

inline int64_t useful_threads(int64_t work) {
  if (work < 2 * kThreadWork) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), work / kThreadWork);
}

// A fresh mapping is paged in 2 MiB at a time: 4 KiB faults cost more than the projection.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePageBytes - 1) & ~uintptr_t(kHugePageBytes - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(kHugePageBytes - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline torch::stable::Tensor empty_in_huge_pages(const std::vector<int64_t>& sizes, ScalarType type,
                                                 int64_t element_bytes) {
  torch::stable::Tensor tensor = empty(sizes, type);
  const int64_t bytes = tensor.numel() * element_bytes;
  if (bytes >= kMappedBytes) prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

}  // namespace embkern
