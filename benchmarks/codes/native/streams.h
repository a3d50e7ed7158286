// Streams of bits in which values have windows, and the order of values.
//
// Codes of this folder store a block of 64 values in 8 bytes per bit. Registers hold a byte per value, 16 j + k
// of them in the order of "positions": lane j of 128 bits, byte k. The position 16 j + 4 q + m holds value 16 q
// + 4 j
// + m, which two unpacking instructions bring in the order of the values, and has the place t = 4 (4 q + m) + j
// in the block's stream of two bits a value: lane j is the stream, shifted by 2 j bits.
#pragma once
#include "registers.h"

namespace {

// Bits and tables of the check and of the measurement. Their content has no influence on the time.
struct Tables {
  alignas(64) int8_t nibbles[8][16];  // summands of levels
  alignas(64) int8_t bytes[128];
  alignas(64) int16_t words[128];
  alignas(64) float floats[4096];
  alignas(64) uint32_t quadruples[256];  // four levels each
  alignas(64) uint64_t eights[256];      // eight magnitudes each
};

// The stream of two bits a value of a row, 16 bytes a block, as a ring. Calls use(block, windows, later ones)
// with a byte for every value: the 8 bits from its own place on, and the 8 bits after these.
class Windows {
 public:
  template <class Use>
  INLINE void run(const uint8_t* stream, int blocks, Use use) const {
    const auto windows = [&](const uint8_t* from) {
      return shift_right(in_each_lane(from), right_) | shift_left(in_each_lane(from + 8), left_);
    };
    uint8_t end[32];  // the last block, and the first one after it
    std::memcpy(end, stream + 16 * (blocks - 1), 16);
    std::memcpy(end + 16, stream, 16);
    const Block first = windows(blocks > 1 ? stream : end);
    Block now = first;
    for (int block = 0; block + 1 < blocks; ++block) {
      const Block next = windows(block + 2 < blocks ? stream + 16 * (block + 1) : end);
      use(block, now, next_byte(next, now));
      now = next;
    }
    use(blocks - 1, now, next_byte(first, now));
  }

  // Of two streams, use(block, windows of the first, windows of the second).
  template <class Use>
  INLINE void run(const uint8_t* first, const uint8_t* second, int blocks, Use use) const {
    uint8_t ends[2][32];
    for (int stream = 0; stream < 2; ++stream) {
      std::memcpy(ends[stream], (stream ? second : first) + 16 * (blocks - 1), 16);
      std::memcpy(ends[stream] + 16, stream ? second : first, 16);
    }
    const auto windows = [&](const uint8_t* from) {
      return shift_right(in_each_lane(from), right_) | shift_left(in_each_lane(from + 8), left_);
    };
    for (int block = 0; block + 1 < blocks; ++block)
      use(block, windows(first + 16 * block), windows(second + 16 * block));
    use(blocks - 1, windows(ends[0]), windows(ends[1]));
  }

 private:
  Block right_ = halves([](int i) { return i / 2 * 2; }), left_ = halves([](int i) { return 64 - i / 2 * 2; });
};

INLINE int bit_of(const uint8_t* stream, int place) { return stream[place / 8] >> place % 8 & 1; }
// `count` bits of a ring of `size` bits from `place` on.
INLINE int ring_bits(const uint8_t* stream, int size, int place, int count) {
  int bits = 0;
  for (int i = 0; i < count; ++i) bits |= bit_of(stream, (place + i) % size) << i;
  return bits;
}
// The place in its block's stream, and the position, of value `value` of a block.
INLINE int place_of(int value) { return value / 16 * 16 + value % 4 * 4 + value / 4 % 4; }
INLINE int position_of(int value) { return value / 4 % 4 * 16 + value / 16 * 4 + value % 4; }

}  // namespace
