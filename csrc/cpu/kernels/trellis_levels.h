// The levels of trellis codes of 1 to 4 bits, from the tables of a packed table, as the search for codes reads
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace embkern {

constexpr int kTrellisWindows = 4096;
constexpr float kTrellisStep = 1.0f / 32;  // of levels

struct TrellisLevels {
  int8_t tables[17][16];
  // Both values of a step of 1 bit, and the middle of the two levels of 3 bits and half of their distance: two
  // numbers of 8 bits a word, which are bfloat16.
  alignas(64) uint32_t one[kTrellisWindows], three[kTrellisWindows];
  alignas(64) float two[kTrellisWindows], four[4][kTrellisWindows];
  // The levels of 4 bits are those of `common` plus four that windows w with equal w >> 10 and w % 16 share,
  // unless a sum wraps around: own[w >> 10][i][w % 16] has minus the middle of all four (i = 0), minus the
  // middles of the lower two and of the upper two (1, 2), and half of the distances of these (3, 4).
  alignas(64) float common[kTrellisWindows], own[4][5][16];
  bool split = true;

  explicit TrellisLevels(const int8_t* given) {
    std::memcpy(tables, given, sizeof(tables));
    for (int window = 0; window < kTrellisWindows; ++window) {
      one[window] = pair(at(1, 0, 0, window), at(1, 1, 0, window));
      two[window] = at(2, 0, 0, window);
      const float third[2] = {at(3, 0, 0, window), at(3, 0, 1, window)};
      three[window] = pair((third[0] + third[1]) / 2, std::max(third[0], third[1]) - (third[0] + third[1]) / 2);
      for (int further = 0; further < 4; ++further) four[further][window] = at(4, 0, further, window);
      set_parts(window);
    }
  }

  // The level of a value at a window; `value` 1 is the second one of a step of 1 bit, and `further` the bits of
  // 3 and 4 that are no part of the stream. Sums wrap around at 8 bits.
  float at(int bits, int value, int further, int window) const {
    const int second = (window ^ window >> 8) & 15, third = (window >> 3 ^ window >> 8) & 15;
    const int8_t (*own)[16] = tables + (bits == 1 ? 3 * value : bits == 2 ? 6 : bits == 3 ? 9 : 13);
    int sum = own[0][window >> 4 & 15] + own[1][second] + own[bits == 3 ? 2 + further : 2][third];
    if (bits == 4) sum += own[3][further | (second & 12)];
    return kTrellisStep * static_cast<int8_t>(sum);
  }

 private:
  static uint32_t pair(float upper, float lower) {
    uint32_t bits[2];
    std::memcpy(&bits[0], &upper, sizeof(upper));
    std::memcpy(&bits[1], &lower, sizeof(lower));
    return bits[0] | bits[1] >> 16;
  }

  void set_parts(int window) {
    const int8_t* further = tables[16] + ((window ^ window >> 8) & 12);
    float level[4];
    for (int i = 0; i < 4; ++i) level[i] = kTrellisStep * further[i];
    common[window] = four[0][window] - level[0];
    for (int i = 1; i < 4; ++i) split = split && four[i][window] - level[i] == common[window];
    std::sort(level, level + 4);
    float (*to)[16] = own[window >> 10];
    const int lane = window % 16;
    to[0][lane] = -(level[1] + level[2]) / 2;
    for (int i = 0; i < 2; ++i) {
      to[1 + i][lane] = -(level[2 * i] + level[2 * i + 1]) / 2;
      to[3 + i][lane] = (level[2 * i + 1] - level[2 * i]) / 2;
    }
  }
};

}  // namespace embkern
