// quantize_trellis: the trellis codes of rows at one tier of a packed table, at the best of some scales for
// each
//
//   values (N, W) float, in units of `spread` (W,) float or none; W is 32 per group. bits (G,) uint8 up to 4, W
//   = 32 G; levels (4, 128) int16 in steps of 2^-12; scales (N, F) float
//   -> codes (N, W) uint8, or (0, W) if they are not needed; scales (N,), projections (N,) float.
//
// At every scale the codes are those whose decoded row is nearest to the values over the scale. The one whose
// decoded row d has the largest projection <x, d> / |d| is taken, with the scale <x, d> / |d|^2.
// Work: 2 passes of 128 states a value; some 100 cycles of a core with AVX-512.
#include <array>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace embkern {
namespace {

constexpr int64_t kRows = 16;            // that a thread takes at a time
constexpr int64_t kWorkPerValue = 2000;  // of useful_threads

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_trellis(const Tensor& values, const std::optional<Tensor>& spread,
                                                    const Tensor& bits, const Tensor& levels,
                                                    const Tensor& scales, bool needs_codes) {
  check_tensor("values", values, 2, ScalarType::Float);
  check_tensor("bits", bits, 1, ScalarType::Byte);
  check_tensor("levels", levels, 2, ScalarType::Short);
  check_tensor("scales", scales, 2, ScalarType::Float);
  const int64_t count = values.size(0), width = values.size(1), groups = bits.size(0);
  check(groups > 0 && width == 32 * groups, "values: expected 32 columns per group, got ", width, " for ",
        groups);
  check_size("levels", levels, 0, 4);
  check_size("levels", levels, 1, kTrellisStates);
  check_size("scales", scales, 0, count);
  check(scales.size(1) > 0, "scales: expected at least 1 of a row, got 0");
  std::vector<float> squares;
  if (spread) {
    check_tensor("spread", *spread, 1, ScalarType::Float);
    check_size("spread", *spread, 0, width);
    const float* each = static_cast<const float*>(spread->const_data_ptr());
    for (int64_t j = 0; j < width; ++j) squares.push_back(each[j] * each[j]);
  }
  // A copy: another thread may write to the tensor after the check.
  const auto* all_bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  const std::vector<uint8_t> bits_of(all_bits, all_bits + groups);
  for (int64_t group = 0; group < groups; ++group)
    check(bits_of[group] <= 4, "bits: expected up to 4, got ", static_cast<int>(bits_of[group]));
  alignas(64) std::array<float, 4 * kTrellisStates> level{};
  const int16_t* fixed = static_cast<const int16_t*>(levels.const_data_ptr());
  for (size_t i = 0; i < level.size(); ++i) level[i] = static_cast<float>(fixed[i]) / 4096;

  Tensor codes = empty({needs_codes ? count : 0, width}, ScalarType::Byte);
  Tensor chosen = empty({count}, ScalarType::Float), projections = empty({count}, ScalarType::Float);
  uint8_t* code = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* scale = static_cast<float*>(chosen.mutable_data_ptr());
  float* projection = static_cast<float*>(projections.mutable_data_ptr());
  const PackingKernels& kernel = packing_kernels();
  const TrellisRow row{static_cast<const float*>(values.const_data_ptr()),
                       spread ? squares.data() : nullptr,
                       bits_of.data(),
                       groups,
                       level.data(),
                       static_cast<const float*>(scales.const_data_ptr()),
                       scales.size(1)};
  const int64_t work = kWorkPerValue * count * width * row.tries;
  for_tasks((count + kRows - 1) / kRows, useful_threads(work), [&](int64_t task) {
    std::vector<uint8_t> scratch(width);
    for (int64_t n = task * kRows; n < std::min(count, (task + 1) * kRows); ++n) {
      TrellisRow own = row;
      own.values += n * width;
      own.scales += n * row.tries;
      const PackedFit fit = kernel.trellis_row(own, needs_codes ? code + n * width : nullptr, scratch.data());
      scale[n] = fit.scale;
      projection[n] = fit.projection;
    }
  });
  return {codes, chosen, projections};
}

}  // namespace embkern
