// The levels of trellis codes of 1 to 4 bits, from the tables of a packed table, as the search for codes reads
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace embkern {

constexpr int kTrellisWindows = 4096, kTrellisStates = kTrellisWindows / 4;
constexpr float kTrellisStep = 1.0f / 32;  // of levels
constexpr int kTrellisUnits = 256;         // of the search in a step of levels: levels just fit into 16 bits

struct TrellisLevels {
  int8_t tables[17][16];
  // In units of the search: the levels of both values of a step of 1 bit, also as pairs in steps; those of 2
  // bits; the middle of the two levels of 3 bits and half of their distance; the four levels of 4 bits.
  alignas(64) int16_t one[2][kTrellisWindows], pairs[kTrellisWindows], two[kTrellisWindows];
  alignas(64) int16_t three[2][kTrellisWindows];
  alignas(64) int16_t four[4][kTrellisWindows];
  // The levels of 4 bits are those of `common` plus four that windows w with equal w >> 10 and w % 16 share,
  // unless a sum wraps around: own[w >> 10][i][w % 16] has minus the middle of all four (i = 0), minus the
  // middles of the lower two and of the upper two (1, 2), and half of the distances of these (3, 4). The 16
  // windows are there twice, for vectors of 32.
  alignas(64) int16_t common[kTrellisWindows], own[4][5][32];
  bool split = true;
  int lowest[5][2], highest[5][2];  // level by bits and value, in steps

  explicit TrellisLevels(const int8_t* given) {
    std::memcpy(tables, given, sizeof(tables));
    for (auto& each : lowest) std::fill_n(each, 2, 127);
    for (auto& each : highest) std::fill_n(each, 2, -128);
    for (int window = 0; window < kTrellisWindows; ++window) {
      const auto level = [&](int bits, int value, int further) {
        const int each = at(bits, value, further, window);
        lowest[bits][value] = std::min(lowest[bits][value], each);
        highest[bits][value] = std::max(highest[bits][value], each);
        return each;
      };
      const int first = level(1, 0, 0), second = level(1, 1, 0);
      one[0][window] = units(2 * first);
      one[1][window] = units(2 * second);
      pairs[window] = pair(first, second);
      two[window] = units(2 * level(2, 0, 0));
      const int third[2] = {level(3, 0, 0), level(3, 0, 1)};
      three[0][window] = units(third[0] + third[1]);
      three[1][window] = units(std::abs(third[0] - third[1]));
      for (int further = 0; further < 4; ++further) four[further][window] = units(2 * level(4, 0, further));
      set_parts(window);
    }
  }

  // The level of a value at a window, in steps; `value` 1 is the second one of a step of 1 bit, and `further`
  // the bits of 3 and 4 that are no part of the stream. Sums wrap around at 8 bits.
  int at(int bits, int value, int further, int window) const {
    const int second = (window ^ window >> 8) & 15, third = (window >> 3 ^ window >> 8) & 15;
    const int8_t (*own_tables)[16] = tables + (bits == 1 ? 3 * value : bits == 2 ? 6 : bits == 3 ? 9 : 13);
    int sum = own_tables[0][window >> 4 & 15] + own_tables[1][second] +
              own_tables[bits == 3 ? 2 + further : 2][third];
    if (bits == 4) sum += own_tables[3][further | (second & 12)];
    return static_cast<int8_t>(sum);
  }

  // Two numbers of 8 bits.
  static int16_t pair(int low, int high) { return static_cast<int16_t>((low & 255) | high * 256); }

 private:
  // Of half a step each, so that a middle of two levels is a whole number of them.
  static int16_t units(int halves) {
    return static_cast<int16_t>(std::clamp(halves * (kTrellisUnits / 2), -32767, 32767));
  }

  void set_parts(int window) {
    const int8_t* further = tables[16] + ((window ^ window >> 8) & 12);
    const int rest = at(4, 0, 0, window) - further[0];
    common[window] = units(2 * rest);
    split = split && std::abs(rest) < 128;
    for (int i = 1; i < 4; ++i) split = split && at(4, 0, i, window) - further[i] == rest;
    int level[4] = {further[0], further[1], further[2], further[3]};
    std::sort(level, level + 4);
    for (int lane = window % 16; lane < 32; lane += 16) {
      int16_t (*to)[32] = own[window >> 10];
      to[0][lane] = units(-level[1] - level[2]);
      for (int i = 0; i < 2; ++i) {
        to[1 + i][lane] = units(-level[2 * i] - level[2 * i + 1]);
        to[3 + i][lane] = units(level[2 * i + 1] - level[2 * i]);
      }
    }
  }
};

}  // namespace embkern
