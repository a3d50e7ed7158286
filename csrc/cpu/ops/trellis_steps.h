// The steps of rows as the search for trellis codes reads them, in whole numbers of 16 bits.
//
// A step adds weight * (level - value)^2 to the costs of paths. Levels and values are whole numbers of 2^-13.
// The square of an error e is e^2 / 2^15, so that costs are in units of 2^-11 of the weight, and at 4 bits,
// whose errors are doubled, in units of 2^-13. Errors of 4 and more, 2 at 4 bits, are all the same then. The
// two values of a step of 1 bit are whole numbers of 2^-5, the step of levels, and the unit of costs is 2^-10.
//
// A step has a larger unit, and its levels and values are scaled by a factor below 1,
// - if one of its values lies so far beyond all levels that their errors would be all the same;
// - if costs in its own unit would saturate before they reach what counts within kReach steps. There may be
//   larger weights, or values beyond the levels: the states of a path remember 5 steps;
// - if it has two values of different weights.
// From step to step, costs change from one unit to the next.
//
// Squared errors of decoded rows are 0.999 to 1.0007 of those of a search in fp32: normal values, rows of
// all-MiniLM-L6-v2 and SmolLM2, with outliers and weights, at 1 to 4 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace embkern {

class TrellisSteps {
 public:
  // `squares` has the weights of a row's values, or is empty if they are 1.
  TrellisSteps(const TrellisLevels& levels, const std::vector<uint8_t>& bits, const std::vector<float>& squares)
      : levels_(levels) {
    const float most = squares.empty() ? 0 : *std::max_element(squares.begin(), squares.end());
    const auto weight = [&](int64_t place) {
      const float share = most > 0 ? squares[place] / most : 1;
      return share > kLeastWeight ? share : kLeastWeight;
    };
    for (int64_t group = 0; group < static_cast<int64_t>(bits.size()); ++group) {
      const int own = bits[group], count = own == 0 ? 0 : own == 1 ? 16 : 32;
      for (int i = 0; i < count; ++i) {
        const int64_t place = group * 32 + place_of_step(i), other = place + (own == 1 ? 16 : 0);
        float weights[2] = {weight(place), weight(other)};
        if (std::abs(weights[0] - weights[1]) < kAlike * weights[0])
          weights[0] = weights[1] = (weights[0] + weights[1]) / 2;
        places_.push_back({own, own == 1 ? 2 : 1, place, {weights[0], weights[1]}});
      }
    }
    for (int b = 1; b <= 4; ++b) {
      for (int value = 0; value < 2; ++value) {
        lowest_[b][value] = levels.lowest[b][value] * kTrellisStep;
        highest_[b][value] = levels.highest[b][value] * kTrellisStep;
      }
    }
    usual_.resize(places_.size());
    std::vector<float> scratch(scratch_size());
    set_units(scratch.data(), usual_.data());
  }

  struct Place {
    int bits, values;
    int64_t first;  // in the row; the second value is 16 places further on
    float weights[2];
  };

  const std::vector<Place>& places() const { return places_; }
  int64_t count() const { return static_cast<int64_t>(places_.size()); }
  int64_t scratch_size() const { return 4 * (count() + 2 * kReach); }

  // Writes the steps of a row times `inverse`.
  void fill(const float* row, float inverse, float* scratch, TrellisStep* steps) const {
    float (*values)[2] = reinterpret_cast<float (*)[2]>(scratch);
    bool beyond = false;
    for (int64_t i = 0; i < count(); ++i) {
      for (int value = 0; value < places_[i].values; ++value) {
        const float x = inverse * row[places_[i].first + 16 * value];
        values[i][value] = x != x ? 0 : std::clamp(x, -kMostValue, kMostValue);
        beyond |= is_beyond(places_[i].bits, value, values[i][value]);
      }
    }
    if (beyond)
      set_units(scratch, steps);
    else
      std::copy(usual_.begin(), usual_.end(), steps);
    for (int64_t i = 0; i < count(); ++i) set_values(values[i], steps[i]);
  }

 private:
  static constexpr float kLeastWeight = 1e-12f;  // relative to the largest one
  static constexpr float kMostValue = 1e20f;
  // Farther away, errors are taken as linear functions of the level.
  static constexpr float kFarthest = 256;
  static constexpr int kReach = 6;
  // Weights of two values of 1 bit that differ by a smaller part are taken as their mean, which is a third
  // quicker. Errors rise by less than 0.06 %: a difference of 14 % raises them by 0.23 %, with its square.
  static constexpr float kAlike = 0.07f;
  static constexpr float kFinest = 1.0f / 2048;
  // How far costs per value may lie above the least one, in units of its weight, for a path to count.
  static constexpr float kRange[5] = {0, 16, 8, 4, 1};

  // The place in its group of the value of a step, of two values that of the first one. 16 values are a matrix
  // of 4 x 4, transposed.
  static int place_of_step(int step) { return step / 16 * 16 + step % 4 * 4 + step / 4 % 4; }

  static int16_t whole(float x) {
    const float bounded = x > 32767 ? 32767 : x > -32767 ? x : -32767;
    return static_cast<int16_t>(bounded + (bounded < 0 ? -0.5f : 0.5f));
  }

  // The unit of squared errors of unscaled levels.
  static float finest(int bits) { return bits == 4 ? kFinest / 4 : bits == 1 ? 2 * kFinest : kFinest; }

  // Whether no level is within 1, or the value itself is out of range.
  bool is_beyond(int bits, int value, float x) const {
    return x > std::min(highest_[bits][value] + 1, 3.99f) || x < std::max(lowest_[bits][value] - 1, -3.99f);
  }

  struct Value {
    float weight;
    bool beyond;
    float nearest, farthest;  // squared errors of levels
  };

  Value value_of(const Place& place, int value, float x) const {
    const float size = std::abs(x), bounded = std::clamp(x, -kFarthest, kFarthest);
    const float above = bounded - lowest_[place.bits][value], below = highest_[place.bits][value] - bounded;
    const float nearest = std::max({-below, -above, 0.0f}), farthest = std::max(above, below);
    return {place.weights[value] * (size > kFarthest ? size / kFarthest : 1), is_beyond(place.bits, value, x),
            nearest * nearest, farthest * farthest};
  }

  // Chooses the units of all steps, and from them the scales and the factors of costs. `scratch` begins with
  // the values, two per step.
  void set_units(float* scratch, TrellisStep* steps) const {
    const int64_t all = count();
    const float (*values)[2] = reinterpret_cast<const float (*)[2]>(scratch);
    float *units = scratch + 2 * all, *needs = units + all;
    for (int64_t i = 0; i < all; ++i) {
      const Place& place = places_[i];
      units[i] = needs[kReach + i] = 0;
      for (int value = 0; value < place.values; ++value) {
        const Value own = value_of(place, value, values[i][value]);
        const float least = finest(place.bits), range = own.farthest - own.nearest;
        units[i] =
            std::max(units[i], own.weight * (own.beyond ? std::max(least, own.farthest / 32768) : least));
        needs[kReach + i] += own.weight / 65536 * (kRange[place.bits] + (own.beyond ? range : 0));
      }
    }
    if (all == 0) return;
    for (int64_t i = 0; i < kReach; ++i) {
      needs[i] = needs[i + all];
      needs[kReach + all + i] = needs[kReach + i];
    }
    // The largest of 8 needs, then of 13.
    for (int64_t apart = 1; apart <= 4; apart *= 2)
      for (int64_t i = 0; i + apart < all + 2 * kReach; ++i) needs[i] = std::max(needs[i], needs[i + apart]);
    for (int64_t i = 0; i < all; ++i) units[i] = std::max({units[i], needs[i], needs[i + 2 * kReach - 7]});
    for (int64_t i = 0; i < all; ++i) {
      set_scales(places_[i], values[i], units[i], steps[i]);
      set_factor(units[i + 1 < all ? i + 1 : 0] / units[i], steps[i]);
    }
  }

  void set_scales(const Place& place, const float* values, float unit, TrellisStep& step) const {
    step.scaled = false;
    for (int value = 0; value < place.values; ++value) {
      const Value own = value_of(place, value, values[value]);
      step.scaled |= own.beyond || own.weight * finest(place.bits) != unit;
      step.scale[value] =
          whole(32768 * std::sqrt(own.weight * (place.bits == 4 ? kFinest / 4 : kFinest) / unit));
    }
    step.bits = static_cast<uint8_t>(place.bits);
  }

  // The factor from the unit of the step that the search comes from.
  static void set_factor(float factor, TrellisStep& step) {
    int exponent;
    const float part = std::frexp(factor, &exponent);
    const float below = exponent > 0 ? part : factor;
    step.factor = static_cast<uint16_t>(factor == 1 ? 0 : std::clamp(65536 * below + 0.5f, 1.0f, 65535.0f));
    step.power = static_cast<uint16_t>(factor == 1 ? 1 : 1 << std::clamp(exponent, 0, 15));
  }

  void set_values(const float* values, TrellisStep& step) const {
    if (!step.scaled && step.bits == 1) {
      const auto steps = [](float x) { return whole(std::clamp(x / kTrellisStep, -127.0f, 127.0f)); };
      step.value[0] = TrellisLevels::pair(steps(values[0]), steps(values[1]));
      return;
    }
    int least = 0;
    for (int value = 0; value < (step.bits == 1 ? 2 : 1); ++value) {
      const float scale = step.scaled ? step.scale[value] / 32768.0f : 1;
      const float x = std::clamp(values[value], -kFarthest, kFarthest);
      step.value[value] = whole(x * (kTrellisUnits / kTrellisStep) * scale);
      const auto level = [&](int steps) {
        return (steps * kTrellisUnits * step.scale[value] + (1 << 14)) >> 15;
      };
      const int above = step.value[value] - level(levels_.highest[step.bits][value]);
      const int below = level(levels_.lowest[step.bits][value]) - step.value[value];
      const int error = std::min((step.bits == 4 ? 2 : 1) * std::max({above, below, 0}), 32767);
      least += (error * error + (1 << 14)) >> 15;
    }
    step.least = static_cast<uint16_t>(std::min(least, 65535));
  }

  const TrellisLevels& levels_;
  std::vector<Place> places_;
  std::vector<TrellisStep> usual_;  // of rows without a value beyond the levels; their values are not set
  float lowest_[5][2], highest_[5][2];
};

}  // namespace embkern
