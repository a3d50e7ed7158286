// Optional and strided tensor arguments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "element_types.h"

namespace embkern {

// The elements of a tensor; null where there is none.
template <class T>
const T* optional_data(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<torch::stable::Tensor> as_contiguous(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional<torch::stable::Tensor>(as_contiguous(*tensor)) : tensor;
}

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, ScalarType type,
                        const std::vector<int64_t>& sizes) {
  check_tensor(name, tensor, sizes.size(), type);
  for (size_t dim = 0; dim < sizes.size(); ++dim) check_size(name, tensor, dim, sizes[dim]);
}

inline void check_shape(const char* name, const std::optional<torch::stable::Tensor>& tensor, ScalarType type,
                        const std::vector<int64_t>& sizes) {
  if (tensor) check_shape(name, *tensor, type, sizes);
}

// The shape of a lookup's output: that of the ids, and the width of a row.
inline std::vector<int64_t> lookup_sizes(const torch::stable::Tensor& ids, int64_t width) {
  const auto own = ids.sizes();
  std::vector<int64_t> sizes(own.size() + 1, width);
  std::copy(own.begin(), own.end(), sizes.begin());
  return sizes;
}

}  // namespace embkern
