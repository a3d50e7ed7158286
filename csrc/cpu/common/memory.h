// Allocation: CPU tensors, scratch memory, and the poisoning of both in tests.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "element_types.h"

namespace embkern {

constexpr int64_t kHugePageBytes = 2 << 20;
// Outputs below this size are not worth a call of madvise. Above it, 4 KiB pages are expensive: glibc maps and
// unmaps every block of 32 MB and more, and may trim the heap after smaller ones, so that a 12 MB output costs
// 3000 page faults of 2 us.
constexpr int64_t kLargeOutputBytes = 4 << 20;

// Whether fresh memory is filled with NaN, so that tests see elements that a kernel does not write. torch's own
// switch (torch.utils.deterministic.fill_uninitialized_memory) does not reach these allocations.
inline std::atomic<bool> poison_memory{false};

inline void poison(void* memory, int64_t bytes) {
  if (bytes > 0 && poison_memory.load(std::memory_order_relaxed)) std::memset(memory, 0xff, bytes);
}

// An uninitialised CPU tensor. torch::stable::new_empty would look its operator up by name on every call.
inline torch::stable::Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
  AtenTensorHandle handle;
  // The headers of torch 2.10 and 2.11 lack STABLE_TORCH_ERROR_CODE_CHECK, which expands to the same for 2.10.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  if (poison_memory.load(std::memory_order_relaxed))
    poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// Requests pages of 2 MiB: faults of 4 KiB pages cost more than the projection that fills them.
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
  int64_t bytes = element_bytes;
  for (const int64_t size : sizes) bytes *= size;
  if (bytes >= kLargeOutputBytes) prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// Memory that grows and is kept, aligned for vectors of every level.
template <class T>
class Buffer {
 public:
  // Returns room for `count` elements. Their values are undefined.
  T* resize(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
      capacity_ = bytes;
    }
    poison(memory_.get(), bytes);
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t capacity_ = 0;
};

}  // namespace embkern
