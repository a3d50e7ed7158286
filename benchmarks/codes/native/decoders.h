// Decoders: each reads rows of blocks of 64 values, and `level` says by a plain loop what it has to find.
#pragma once
#include "streams.h"

namespace {

// ---- scalar levels
// --------------------------------------------------------------------------------------------

// Codes of a value alone: a shuffle.
template <int BITS>
class Scalar {
  static_assert(BITS == 2 || BITS == 4, "");

 public:
  static constexpr int kBits = BITS;
  explicit Scalar(const Tables& tables, int bias) {
    int8_t own[16];
    for (int i = 0; i < 16; ++i) own[i] = static_cast<int8_t>(tables.nibbles[0][i] + bias);
    table_ = in_each_lane(own);
  }
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    for (int block = 0; block < blocks; ++block) {
      const Block low = shift_right(in_each_lane(row + 16 * block), right_);
      if constexpr (BITS == 2) {
        use(block, shuffle(table_, low & same(3)));
      } else {
        const Block high = shift_left(shift_right(in_each_lane(row + 16 * (blocks + block)), right_), two_);
        use(block, shuffle(table_, choose(same(3), low, high) & same(15)));
      }
    }
  }
  static int level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    const int place = 128 * block + position_of(value) % 16 * 8 + position_of(value) / 16 * 2;
    int code = bit_of(row, place) + 2 * bit_of(row, place + 1);
    if (BITS == 4) code += 4 * bit_of(row + 16 * blocks, place) + 8 * bit_of(row + 16 * blocks, place + 1);
    return tables.nibbles[0][code];
  }

 private:
  Block table_, right_ = halves([](int i) { return i / 2 * 2; }), two_ = halves([](int) { return 2; });
};

// ---- trellises with sums of shuffled levels
// -------------------------------------------------------------------

// States of 4 bits of the ring of two bits a value: one shuffle.
class Trellis16 {
 public:
  static constexpr int kBits = 2;
  explicit Trellis16(const Tables& tables, int bias) {
    int8_t own[16];
    for (int i = 0; i < 16; ++i) own[i] = static_cast<int8_t>(tables.nibbles[0][i] + bias);
    table_ = in_each_lane(own);
  }
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    windows_.run(row, blocks, [&](int block, const Block& now, const Block&) {
      use(block, shuffle(table_, now & same(15)));
    });
  }
  static int level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    return tables.nibbles[0][ring_bits(row, 128 * blocks, 128 * block + 2 * place_of(value), 4)];
  }

 private:
  Windows windows_;
  Block table_;
};

// States of 8 bits: the sum of two shuffles.
class Sums256 {
 public:
  static constexpr int kBits = 2;
  explicit Sums256(const Tables& tables, int bias) {
    int8_t own[16];
    for (int i = 0; i < 16; ++i) own[i] = static_cast<int8_t>(tables.nibbles[0][i] + bias);
    low_ = in_each_lane(own), high_ = in_each_lane(tables.nibbles[1]);
  }
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    windows_.run(row, blocks, [&](int block, const Block& now, const Block&) {
      use(block, shuffle(low_, now & same(15)) + shuffle(high_, shift_words<4>(now) & same(15)));
    });
  }
  static int level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    const int state = ring_bits(row, 128 * blocks, 128 * block + 2 * place_of(value), 8);
    return static_cast<int8_t>(tables.nibbles[0][state & 15] + tables.nibbles[1][state >> 4]);
  }

 private:
  Windows windows_;
  Block low_, high_;
};

// Windows of 12 bits: the sum of three shuffles. Bits of the window select among the entries of each table,
// added modulo 2. One further bit of a value chooses between two tables 2; two further ones select in a
// table 3. Of one bit a value, a window has two values, with three tables each: 16 values of a group follow
// from as many windows, the next 16 from the same ones.
template <int BITS>
class Sums4096 {
 public:
  static constexpr int kBits = BITS;
  explicit Sums4096(const Tables& tables, int bias) {
    for (int i = 0; i < 6; ++i) {
      const bool biased = i == 0 || (BITS == 1 && i == 3);
      int8_t own[16];
      for (int j = 0; j < 16; ++j) own[j] = static_cast<int8_t>(tables.nibbles[i][j] + (biased ? bias : 0));
      table_[i] = in_each_lane(own);
    }
  }

  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    constexpr int kMore = 8 * BITS - 16;  // bytes of further bits of a block
    windows_.run(row, BITS == 1 ? blocks / 2 : blocks, [&](int block, const Block& now, const Block& later) {
      const Block nibble = same(15), high = shift_words<4>(now) & nibble;
      const Block mixed = masked_difference(now, later, nibble);
      const Block other = masked_difference(shift_words<3>(now), later, nibble);
      const Block sum = shuffle(table_[0], high) + shuffle(table_[1], mixed);
      const uint8_t* more = row + 16 * blocks + kMore * block;
      if constexpr (BITS == 1) {
        const Block first = sum + shuffle(table_[2], other);
        const Block second = shuffle(table_[3], high) + shuffle(table_[4], mixed) + shuffle(table_[5], other);
        use(2 * block, alternating_low(first, second));
        use(2 * block + 1, alternating_high(first, second));
      } else if constexpr (BITS == 2) {
        use(block, sum + shuffle(table_[2], other));
      } else if constexpr (BITS == 3) {
        use(block, sum + shuffle_either(table_[2], table_[3], other, more));
      } else {
        const Block own = shift_right(in_each_lane(more), right_);
        use(block, sum + shuffle(table_[2], other) + shuffle(table_[3], choose(same(3), own, mixed)));
      }
    });
  }

  static int level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    int place = 128 * block + 2 * place_of(value), size = 128 * blocks;
    const int8_t (*nibbles)[16] = tables.nibbles;
    if (BITS == 1) {
      place = 128 * (block / 2) + 2 * place_of(block % 2 * 32 + value / 32 * 16 + value % 16), size /= 2;
      nibbles += 3 * (value / 16 % 2);
    }
    const int window = ring_bits(row, size, place, 12), position = position_of(value);
    const int mixed = (window ^ window >> 8) & 15, other = (window >> 3 ^ window >> 8) & 15;
    const uint8_t* more = row + 16 * blocks + (8 * BITS - 16) * block;
    int sum = nibbles[0][window >> 4 & 15] + nibbles[1][mixed];
    sum += nibbles[BITS == 3 && bit_of(more, position) ? 3 : 2][other];
    if (BITS == 4) {
      const int own = position % 16 * 8 + position / 16 * 2;
      sum += nibbles[3][bit_of(more, own) + 2 * bit_of(more, own + 1) + (mixed & 12)];
    }
    return static_cast<int8_t>(sum);
  }

 private:
  Windows windows_;
  Block table_[6], right_ = halves([](int i) { return i / 2 * 2; });
};

#if defined(__AVX512VBMI__)
// States of 6 or 7 bits of the ring of two bits a value: a permutation of one or two registers of bytes. If not
// RUN, each 32 values are a ring of their own, whose windows are rotations; two rings share a block.
template <int MEMORY, bool RUN>
class TrellisBytes {
 public:
  static constexpr int kBits = 2;
  explicit TrellisBytes(const Tables& tables, int bias) {
    alignas(64) int8_t own[128];
    for (int i = 0; i < 128; ++i) own[i] = static_cast<int8_t>(tables.bytes[i] + bias);
    table_[0] = from_memory(own), table_[1] = from_memory(own + 64);
  }
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    if constexpr (RUN) {
      windows_.run(row, blocks, [&](int block, const Block& now, const Block&) { use(block, look_up(now)); });
    } else {
      for (int block = 0; block < blocks; ++block) {
        const Block all = in_each_lane(row + 16 * block);
        use(block, look_up({{_mm512_rorv_epi64(all.part[0], right_.part[0])}}));
      }
    }
  }
  static int level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    if (RUN) return tables.bytes[ring_bits(row, 128 * blocks, 128 * block + 2 * place_of(value), MEMORY)];
    const int position = position_of(value), half = position % 16 / 8;
    return tables
        .bytes[ring_bits(row + 16 * block + 8 * half, 64, position % 8 * 8 + position / 16 * 2, MEMORY)];
  }

 private:
  INLINE Block look_up(const Block& state) const {
    if constexpr (MEMORY == 6) return {{_mm512_permutexvar_epi8(state.part[0], table_[0].part[0])}};
    return {{_mm512_permutex2var_epi8(table_[0].part[0], state.part[0], table_[1].part[0])}};
  }
  Windows windows_;
  Block table_[2], right_ = halves([](int i) { return i / 2 * 2; });
};
#endif

// ---- words of several values
// ----------------------------------------------------------------------------------

// Pairs of values of one of 16 words, two bits a value: a shuffle for each of both.
class Pairs {
 public:
  static constexpr int kBits = 2;
  explicit Pairs(const Tables& tables, int bias) {
    alignas(64) int8_t own[64];
    for (int i = 0; i < 64; ++i) own[i] = static_cast<int8_t>(tables.nibbles[i / 16 % 2][i % 16] + bias);
    table_ = from_memory(own);
  }
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    for (int block = 0; block < blocks; ++block)
      use(block, shuffle(table_, shift_right(in_each_lane(row + 16 * block), right_) & same(15)));
  }
  static int level(const Tables& tables, const uint8_t* row, int, int block, int value) {
    const int position = position_of(value), lane = position / 16;
    return tables.nibbles[lane % 2][row[16 * block + position % 16] >> lane / 2 * 4 & 15];
  }

 private:
  Block table_, right_ = halves([](int i) { return i / 4 * 4; });
};

// Four values of one of 256 words, two bits a value: a gather.
class Quadruples {
 public:
  static constexpr int kBits = 2;
  explicit Quadruples(const Tables& tables, int bias) : bias_(same(bias)), words_(tables.quadruples) {}
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    for (int block = 0; block < blocks; ++block) {
      const uint8_t* codes = row + 16 * block;
      use(block, each([&](int i) {
                   const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i * kLanes));
#if defined(__AVX512BW__)
                   return _mm512_i32gather_epi32(_mm512_cvtepu8_epi32(own), words_, 4);
#else
                   return _mm256_i32gather_epi32(reinterpret_cast<const int*>(words_),
                                                 _mm256_cvtepu8_epi32(own), 4);
#endif
                 }) + bias_);
    }
  }
  static int level(const Tables& tables, const uint8_t* row, int, int block, int value) {
    const int position = position_of(value);
    return static_cast<int8_t>(tables.quadruples[row[16 * block + position / 4]] >> position % 4 * 8);
  }

 private:
  Block bias_;
  const uint32_t* words_;
};

// Eight values of one of 256 words of magnitudes and eight signs, as of a lattice, two bits a value: a gather.
class Eights {
 public:
  static constexpr int kBits = 2;
  explicit Eights(const Tables& tables, int bias) : bias_(same(bias)), words_(tables.eights) {}
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    for (int block = 0; block < blocks; ++block) {
      const uint8_t *codes = row + 16 * block, *signs = codes + 8;
#if defined(__AVX512BW__)
      uint64_t negative;
      std::memcpy(&negative, signs, 8);
      const __m512i index = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      const __m512i words = _mm512_i64gather_epi64(index, words_, 8);
      use(block, Block{{_mm512_mask_sub_epi8(words, negative, _mm512_setzero_si512(), words)}} + bias_);
#else
      const __m256i own_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2,
                                                2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
      const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
      use(block, each([&](int i) {
                   int own, sign;
                   std::memcpy(&own, codes + 4 * i, 4), std::memcpy(&sign, signs + 4 * i, 4);
                   const __m256i words =
                       _mm256_i64gather_epi64(reinterpret_cast<const long long*>(words_),
                                              _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(own)), 8);
                   const __m256i spread =
                       _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(sign), own_byte), own_bit);
                   const __m256i minus = _mm256_cmpeq_epi8(spread, own_bit);
                   return _mm256_sub_epi8(_mm256_xor_si256(words, minus), minus);
                 }) + bias_);
#endif
    }
  }
  static int level(const Tables& tables, const uint8_t* row, int, int block, int value) {
    const int position = position_of(value);
    const int magnitude = tables.eights[row[16 * block + position / 8]] >> position % 8 * 8 & 127;
    return bit_of(row + 16 * block + 8, position) ? -magnitude : magnitude;
  }

 private:
  Block bias_;
  const uint64_t* words_;
};

// ---- trellises with levels of more than a byte
// ------------------------------------------------------------------

// The states of a block's values, words of 16 bits, from two bytes each, to indices of 32 bits in the order of
// the values: calls use(vector, indices).
template <class Use>
INLINE void for_states(const Block& low, const Block& high, Use use) {
  for_parts([&](int i) {
    const Part zero = WHOLE(setzero)(), first = OP(unpacklo_epi8)(low.part[i], high.part[i]),
               second = OP(unpackhi_epi8)(low.part[i], high.part[i]);
    use(i, OP(unpacklo_epi16)(first, zero)), use(kParts + i, OP(unpackhi_epi16)(first, zero));
    use(2 * kParts + i, OP(unpacklo_epi16)(second, zero)),
        use(3 * kParts + i, OP(unpackhi_epi16)(second, zero));
  });
}

// States of 12 bits, each with a level of its own: a gather from 16 KB.
class Gathered4096 {
 public:
  static constexpr int kBits = 2;
  explicit Gathered4096(const Tables& tables, int) : levels_(tables.floats) {}
  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    windows_.run(row, blocks, [&](int block, const Block& now, const Block& later) {
      Values values;
      for_states(now, later & same(15), [&](int v, Part state) {
#if defined(__AVX512BW__)
        values.vector[v] = _mm512_i32gather_ps(state, levels_, 4);
#else
        values.vector[v] = _mm256_i32gather_ps(levels_, state, 4);
#endif
      });
      use(block, values);
    });
  }
  static float level(const Tables& tables, const uint8_t* row, int blocks, int block, int value) {
    return tables.floats[ring_bits(row, 128 * blocks, 128 * block + 2 * place_of(value), 12)];
  }

 private:
  Windows windows_;
  const float* levels_;
};

// States of 16 bits, whose level is the sum of the bytes of a linear function of the state (QTIP's 1MAD). Of
// four bits a value, two streams have 8 bits of it each.
template <int BITS>
class Computed65536 {
  static_assert(BITS == 2 || BITS == 4, "");

 public:
  static constexpr int kBits = BITS;
  static constexpr uint32_t kFactor = 34038481, kSummand = 76625530;
  explicit Computed65536(const Tables&, int) {}

  INLINE Values values(const Block& low, const Block& high) const {
    const Part factor = OP(set1_epi32)(kFactor), summand = OP(set1_epi32)(kSummand), ones = OP(set1_epi8)(1);
    const Part middle = OP(set1_epi32)(-510);
    Values values;
    for_states(low, high, [&](int v, Part state) {
      const Part mixed = OP(add_epi32)(OP(mullo_epi32)(state, factor), summand);
#if defined(__AVX512VNNI__)
      const Part sum = OP(dpbusd_epi32)(middle, mixed, ones);
#else
      const Part sum = OP(add_epi32)(OP(madd_epi16)(OP(maddubs_epi16)(mixed, ones), OP(set1_epi16)(1)), middle);
#endif
      values.vector[v] = OP(cvtepi32_ps)(sum);
    });
    return values;
  }

  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    if constexpr (BITS == 2) {
      windows_.run(row, blocks,
                   [&](int block, const Block& now, const Block& later) { use(block, values(now, later)); });
    } else {
      windows_.run(row, row + 16 * blocks, blocks, [&](int block, const Block& first, const Block& second) {
        use(block, values(first, second));
      });
    }
  }

  static float level(const Tables&, const uint8_t* row, int blocks, int block, int value) {
    const int place = 128 * block + 2 * place_of(value);
    uint32_t state = ring_bits(row, 128 * blocks, place, BITS == 2 ? 16 : 8);
    if (BITS == 4) state |= ring_bits(row + 16 * blocks, 128 * blocks, place, 8) << 8;
    const uint32_t mixed = state * kFactor + kSummand;
    return static_cast<float>((mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24)) - 510;
  }

 private:
  Windows windows_;
};

}  // namespace
