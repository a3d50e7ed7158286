// Arguments that quantize_rows and quantize_trellis share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "element_types.h"

namespace embkern {

// The squares of the spread (W,); none if the spread is 1.
inline std::vector<float> checked_squares(const std::optional<torch::stable::Tensor>& spread, int64_t width) {
  std::vector<float> squares;
  if (!spread) return squares;
  check_tensor("spread", *spread, 1, ScalarType::Float);
  check_size("spread", *spread, 0, width);
  const float* each = static_cast<const float*>(spread->const_data_ptr());
  for (int64_t j = 0; j < width; ++j) squares.push_back(each[j] * each[j]);
  return squares;
}

// A copy of the bits of each group, at most `most`: another thread may write to the tensor after the check.
inline std::vector<uint8_t> checked_bits(const torch::stable::Tensor& bits, int most) {
  const auto* data = static_cast<const uint8_t*>(bits.const_data_ptr());
  std::vector<uint8_t> copy(data, data + bits.size(0));
  for (const uint8_t each : copy)
    check(each <= most, "bits: expected up to ", most, ", got ", static_cast<int>(each));
  return copy;
}

}  // namespace embkern
