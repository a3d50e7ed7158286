// quantize_trellis: the trellis codes of rows of a packed table, at the best of several scales for each row.
//
//   values (N, W) float, in units of `spread` (W,) float or none; W is 32 per group. bits (G,) uint8 up to 4, W
//   = 32 G; levels (17, 16) int8 in steps of 1 / 32; scales (N, F) float
//   -> codes (N, W) uint8, or (0, W) if not needed; scales (N,), projections (N,) float.
//
// Every scale gives codes, those whose decoded row d is nearest to the values divided by the scale. The scale
// with the largest projection <x, d> / |d| is chosen, and replaced by <x, d> / |d|^2.
//
// Work for a scale and a value of a row of 640: 500 to 1300 cycles of a core with AVX-512 at 1 to 4 bits.
#include <memory>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packing.h"

namespace embkern {
namespace {

constexpr int64_t kRows = 4;             // of a task
constexpr int64_t kWorkPerValue = 5000;  // in the unit of useful_threads

// What a task needs, some 300 bytes a value.
class Memory {
 public:
  explicit Memory(int64_t width)
      : memory{reinterpret_cast<float (*)[kTrellisWindows]>(costs_.resize(2 * kTrellisWindows)),
               choices_.resize(width * TrellisMemory::kChoiceBytes), codes_.resize(2 * width),
               steps_.resize(width)} {}

 private:
  Buffer<float> costs_;
  Buffer<uint8_t> choices_, codes_;
  Buffer<TrellisStep> steps_;

 public:
  const TrellisMemory memory;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_trellis(const Tensor& values, const std::optional<Tensor>& spread,
                                                    const Tensor& bits, const Tensor& levels,
                                                    const Tensor& scales, bool needs_codes) {
  check_tensor("values", values, 2, ScalarType::Float);
  check_tensor("bits", bits, 1, ScalarType::Byte);
  check_tensor("levels", levels, 2, ScalarType::Char);
  check_tensor("scales", scales, 2, ScalarType::Float);
  const int64_t count = values.size(0), width = values.size(1), groups = bits.size(0);
  check(groups > 0 && width == 32 * groups, "values: expected 32 columns per group, got ", width, " for ",
        groups);
  check_size("levels", levels, 0, 17);
  check_size("levels", levels, 1, 16);
  check_size("scales", scales, 0, count);
  check(scales.size(1) > 0, "scales: expected at least 1 per row, got 0");
  const std::vector<float> squares = checked_squares(spread, width);
  const std::vector<uint8_t> group_bits = checked_bits(bits, 4);
  const auto search_levels =
      std::make_unique<const TrellisLevels>(static_cast<const int8_t*>(levels.const_data_ptr()));

  Tensor codes = empty({needs_codes ? count : 0, width}, ScalarType::Byte);
  Tensor chosen = empty({count}, ScalarType::Float), projections = empty({count}, ScalarType::Float);
  uint8_t* code = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* scale = static_cast<float*>(chosen.mutable_data_ptr());
  float* projection = static_cast<float*>(projections.mutable_data_ptr());
  const PackingKernels& kernel = packing_kernels();
  const TrellisRow row{static_cast<const float*>(values.const_data_ptr()),
                       spread ? squares.data() : nullptr,
                       group_bits.data(),
                       groups,
                       search_levels.get(),
                       static_cast<const float*>(scales.const_data_ptr()),
                       scales.size(1)};
  const int64_t work = kWorkPerValue * count * width * row.tries;
  for_tasks((count + kRows - 1) / kRows, useful_threads(work), [&](int64_t task) {
    const Memory scratch(width);
    for (int64_t n = task * kRows; n < std::min(count, (task + 1) * kRows); ++n) {
      TrellisRow own = row;
      own.values += n * width;
      own.scales += n * row.tries;
      const PackedFit fit = kernel.trellis_row(own, scratch.memory, needs_codes ? code + n * width : nullptr);
      scale[n] = fit.scale;
      projection[n] = fit.projection;
    }
  });
  return {codes, chosen, projections};
}

}  // namespace embkern
