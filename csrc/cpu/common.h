// Element types, their dispatch and allocation: what the CPU ops share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "checks.h"

#if defined(__GNUC__)
#define EMBKERN_INLINE inline __attribute__((always_inline))
#else
#define EMBKERN_INLINE inline
#endif

namespace embkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// float64 accumulates in float64, everything narrower in float32.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>)
    return ScalarType::Double;
  else
    return ScalarType::Float;
}

template <class Body>
void dispatch_floating(ScalarType type, const char* name, Body body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      check(false, name, ": expected dtype Float, Double, BFloat16 or Half, got ",
            torch::headeronly::toString(type));
  }
}

template <class Body>
void dispatch_index(ScalarType type, const char* name, Body body) {
  switch (type) {
    case ScalarType::Int:
      return body(int32_t{});
    case ScalarType::Long:
      return body(int64_t{});
    default:
      check(false, name, ": expected dtype Int or Long, got ", torch::headeronly::toString(type));
  }
}

// Whether fresh memory is filled with NaN first, so that tests see what a kernel forgot to write. The
// allocation below is beneath torch's own switch for that
// (torch.utils.deterministic.fill_uninitialized_memory).
inline std::atomic<bool> poison_memory{false};

inline void poison(void* memory, int64_t bytes) {
  if (bytes > 0 && poison_memory.load(std::memory_order_relaxed)) std::memset(memory, 0xff, bytes);
}

// An uninitialised CPU tensor. torch::stable::new_empty would look its operator up by name.
inline torch::stable::Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
  AtenTensorHandle handle;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which the headers of torch 2.10 and 2.11 lack; compiled for 2.10 it is
  // the same.
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor tensor(handle);
  poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

}  // namespace embkern
