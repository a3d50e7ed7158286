// Argument checks of the raw ops. A message names the argument, the expected value and the actual one.
//
// In Python std::out_of_range becomes IndexError and std::invalid_argument ValueError. They must be thrown
// outside parallel_for, which would lose the message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace embkern {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(message(parts...));
}

// The raw ops take contiguous CPU tensors; the public functions make them so.
inline void check_tensor(const char* name, const torch::stable::Tensor& tensor, int64_t ndim,
                         torch::headeronly::ScalarType dtype) {
  check(tensor.is_cpu(), name, ": expected a CPU tensor");
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  check(tensor.dim() == ndim, name, ": expected ", ndim, " dimension(s), got ", tensor.dim());
  check(tensor.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_size(const char* name, const torch::stable::Tensor& tensor, int64_t dim, int64_t expected) {
  check(tensor.size(dim) == expected, name, ": expected size ", expected, " in dimension ", dim, ", got ",
        tensor.size(dim));
}

}  // namespace embkern
