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
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(message(parts...));
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// Whether a tensor has a dtype. Tensor::scalar_type compares the number with those of all dtypes, a call each.
inline bool has_dtype(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  int32_t number;
  // The headers of torch 2.10 and 2.11 lack STABLE_TORCH_ERROR_CODE_CHECK, which expands to the same for 2.10.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number == torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// The raw ops take contiguous CPU tensors; the public functions make them so. What a message says is read only
// for a tensor that is refused: every read is a call, and they take much of the time of a small op.
inline void check_tensor(const char* name, const torch::stable::Tensor& tensor, int64_t ndim,
                         torch::headeronly::ScalarType dtype) {
  check(tensor.is_cpu(), name, ": expected a CPU tensor");
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  if (const int64_t dim = tensor.dim(); dim != ndim)
    fail(name, ": expected ", ndim, " dimension(s), got ", dim);
  if (!has_dtype(tensor, dtype))
    fail(name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_size(const char* name, const torch::stable::Tensor& tensor, int64_t dim, int64_t expected) {
  if (const int64_t size = tensor.size(dim); size != expected)
    fail(name, ": expected size ", expected, " in dimension ", dim, ", got ", size);
}

}  // namespace embkern
