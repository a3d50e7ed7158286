// quantize_trellis: the trellis codes of rows of a packed table, at the best of several scales for each row.
//
//   values (N, W) float, in units of `spread` (W,) float or none; W is 32 per group. bits (G,) uint8 up to 4, W
//   = 32 G; levels (17, 16) int8 in steps of 1 / 32; scales (N, F) float
//   -> codes (N, W) uint8, or (0, W) if not needed; scales (N,), projections (N,) float.
//
// Every scale gives codes, those whose decoded row d is nearest to the values divided by the scale. The scale
// with the largest projection <x, d> / |d| is chosen, and replaced by <x, d> / |d|^2.
//
// Work for a scale and a value of a row of 640: 0.15, 0.21, 0.29 and 0.44 us of a core of Zen 4 with AVX-512 at
// 1 to 4 bits; 0.27 us at 1 bit where weights of the two values of a step differ.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/tasks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/ops/ops.h"
#include "cpu/ops/packing.h"
#include "cpu/ops/trellis_steps.h"

namespace embkern {
namespace {

constexpr int64_t kRows = 4;             // of a task
constexpr int64_t kWorkPerValue = 2500;  // in the unit of useful_threads

struct Row {
  const float *values, *squares;  // squares of the spread, null if it is 1
  int64_t width;
  const float* scales;  // that divide the values, to be tried
  int64_t tries;
};

// What a task needs, some 300 bytes a value.
class Search {
 public:
  Search(const TrellisLevels& levels, const TrellisSteps& steps, int64_t width)
      : levels_(levels),
        steps_(steps),
        ring_{&levels, ring_steps_.resize(steps.count()), steps.count(),
              reinterpret_cast<uint16_t (*)[kTrellisStates]>(costs_.resize(2 * kTrellisStates)),
              choices_.resize(std::max(steps.count(), TrellisRing::kLeastSteps) * TrellisRing::kChoiceBytes)} {
    scratch_.resize(steps.scratch_size());
    bits_.resize(steps.count());
    codes_.resize(width);
  }

  // The best codes of a row are written unless null.
  PackedFit row(const Row& row, uint8_t* codes) {
    PackedFit best{};
    uint8_t* own = codes_.get();
    std::memset(own, 0, row.width);  // Groups of no bits have no steps.
    for (int64_t i = 0; i < row.tries; ++i) {
      const float inverse = row.scales[i] > 0 ? 1 / row.scales[i] : 0;
      steps_.fill(row.values, inverse, scratch_.get(), ring_steps_.get());
      if (steps_.count() > 0) packing_kernels().search_trellis(ring_, bits_.get());
      double dot = 0, square = 0;
      set_codes(row, inverse, own, &dot, &square);
      square = std::max(square, 1e-30);
      const float projection = static_cast<float>(dot / std::sqrt(square));
      if (i == 0 || projection > best.projection) {  // negative where the scale is far too large
        best = {static_cast<float>(dot / square), projection};
        if (codes) std::memcpy(codes, own, row.width);
      }
    }
    return best;
  }

 private:
  // Writes the codes of a row, given the bits of its steps, and adds up its products with the decoded row.
  void set_codes(const Row& row, float inverse, uint8_t* codes, double* dot, double* square) const {
    const uint8_t* bits = bits_.get();
    int window = 0;
    for (int64_t i = std::min<int64_t>(steps_.count(), 5); i-- > 0;) window = window << 2 | bits[i];
    for (int64_t i = steps_.count(); i-- > 0;) {
      window = (window << 2 | bits[i]) % kTrellisWindows;
      const TrellisSteps::Place& place = steps_.places()[i];
      for (int value = 0; value < place.values; ++value) {
        const int64_t at = place.first + 16 * value;
        const auto level = [&](int further) {
          return kTrellisStep * levels_.at(place.bits, value, further, window);
        };
        const auto error = [&](int further) { return std::abs(level(further) - inverse * row.values[at]); };
        int further = 0;
        for (int e = 1; e < 1 << std::max(place.bits - 2, 0); ++e)
          if (error(e) < error(further)) further = e;
        codes[at] = static_cast<uint8_t>(place.bits == 1 ? bits[i] >> value & 1 : bits[i] | further << 2);
        const double own = level(further), weighted = row.squares ? own * row.squares[at] : own;
        *dot += weighted * row.values[at];
        *square += weighted * own;
      }
    }
  }

  const TrellisLevels& levels_;
  const TrellisSteps& steps_;
  Buffer<uint16_t> costs_;
  Buffer<uint8_t> choices_, codes_, bits_;
  Buffer<TrellisStep> ring_steps_;
  Buffer<float> scratch_;
  const TrellisRing ring_;  // of the buffers
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
  const TrellisSteps steps(*search_levels, group_bits, squares);
  const Row row{static_cast<const float*>(values.const_data_ptr()), spread ? squares.data() : nullptr, width,
                static_cast<const float*>(scales.const_data_ptr()), scales.size(1)};
  const int64_t work = kWorkPerValue * count * width * row.tries;
  for_tasks((count + kRows - 1) / kRows, useful_threads(work), [&](int64_t task) {
    Search search(*search_levels, steps, width);
    for (int64_t n = task * kRows; n < std::min(count, (task + 1) * kRows); ++n) {
      Row own = row;
      own.values += n * width;
      own.scales += n * row.tries;
      const PackedFit fit = search.row(own, needs_codes ? code + n * width : nullptr);
      scale[n] = fit.scale;
      projection[n] = fit.projection;
    }
  });
  return {codes, chosen, projections};
}

}  // namespace embkern
