// quantize_rows: the codes of rows, value by value, at the best of several scales for each row. A packed table
// has such codes from five bits on; for fewer bits it has trellis codes (quantize_trellis).
//
//   values (N, W) float, in units of `spread` (W,) float or none; W is 32 per group. bits (G,) uint8, W = 32 G;
//   levels (4, 16) int16 in steps of 2^-12; steps (9,) and factors (F,) float
//   -> codes (N, W) uint8, or (0, W) if not needed; scales (N,), projections (N,) float.
//
// Every factor gives codes, those of the levels nearest to value / (root mean square * factor), and a decoded
// row d. The factor with the largest projection <x, d> / |d| is chosen, with the scale <x, d> / |d|^2.
//
// Bytes moved per row: 4 W read once (later tries find the row in L1), W written.
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packing.h"

namespace embkern {
namespace {

constexpr int64_t kRows = 64;  // of a task

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& values, const std::optional<Tensor>& spread,
                                                 const Tensor& bits, const Tensor& levels, const Tensor& steps,
                                                 const Tensor& factors, bool needs_codes) {
  check_tensor("values", values, 2, ScalarType::Float);
  check_tensor("bits", bits, 1, ScalarType::Byte);
  check_tensor("levels", levels, 2, ScalarType::Short);
  check_tensor("steps", steps, 1, ScalarType::Float);
  check_tensor("factors", factors, 1, ScalarType::Float);
  const int64_t count = values.size(0), width = values.size(1), groups = bits.size(0);
  check(groups > 0 && width == 32 * groups, "values: expected 32 columns per group, got ", width, " for ",
        groups);
  check(levels.numel() == 64, "levels: expected shape (4, 16)");
  check_size("steps", steps, 0, 9);
  check(factors.size(0) > 0, "factors: expected at least 1, got 0");
  const std::vector<float> squares = checked_squares(spread, width);
  const std::vector<uint8_t> group_bits = checked_bits(bits, 8);
  std::array<float, 64> level{}, edge{};
  const int16_t* fixed = static_cast<const int16_t*>(levels.const_data_ptr());
  for (int i = 0; i < 64; ++i) level[i] = static_cast<float>(fixed[i]) / 4096;
  for (int own = 0; own < 4; ++own)
    for (int i = 0; i < 16; ++i)
      edge[16 * own + i] = i + 1 < 2 << own ? (level[16 * own + i] + level[16 * own + i + 1]) / 2
                                            : std::numeric_limits<float>::infinity();

  Tensor codes = empty({needs_codes ? count : 0, width}, ScalarType::Byte);
  Tensor scales = empty({count}, ScalarType::Float), projections = empty({count}, ScalarType::Float);
  uint8_t* code = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* scale = static_cast<float*>(scales.mutable_data_ptr());
  float* projection = static_cast<float*>(projections.mutable_data_ptr());
  const PackingKernels& kernel = packing_kernels();
  const RowToPack row{static_cast<const float*>(values.const_data_ptr()),
                      spread ? squares.data() : nullptr,
                      group_bits.data(),
                      groups,
                      level.data(),
                      edge.data(),
                      static_cast<const float*>(steps.const_data_ptr()),
                      static_cast<const float*>(factors.const_data_ptr()),
                      factors.size(0)};
  for_tasks((count + kRows - 1) / kRows, useful_threads(4 * count * width * row.tries), [&](int64_t task) {
    for (int64_t n = task * kRows; n < std::min(count, (task + 1) * kRows); ++n) {
      RowToPack own = row;
      own.values += n * width;
      const PackedFit fit = kernel.quantize_row(own, needs_codes ? code + n * width : nullptr);
      scale[n] = fit.scale;
      projection[n] = fit.projection;
    }
  });
  return {codes, scales, projections};
}

}  // namespace embkern
