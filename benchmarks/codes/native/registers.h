// Registers of AVX-512 or AVX2, 64 bytes at a time, as the decoders use them.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

// 64 bytes: one register of AVX-512, or two of AVX2.
#if defined(__AVX512BW__)
constexpr int kParts = 1, kLanes = 16;
typedef __m512i Part;
typedef __m512 Floats;
#define OP(name) _mm512_##name
#define WHOLE(name) _mm512_##name##_si512
#else
constexpr int kParts = 2, kLanes = 8;
typedef __m256i Part;
typedef __m256 Floats;
#define OP(name) _mm256_##name
#define WHOLE(name) _mm256_##name##_si256
#endif
constexpr int kBlockVectors = 64 / kLanes;  // vectors of the floats of a block

struct Block {
  Part part[kParts];
};

template <class F>
INLINE Block each(F f) {
#if defined(__AVX512BW__)
  return {{f(0)}};
#else
  return {{f(0), f(1)}};
#endif
}
// f(0) and, of AVX2, f(1). Without a loop, registers stay registers.
template <class F>
INLINE void for_parts(F f) {
  f(0);
  if (kParts == 2) f(1);
}

INLINE Part part_at(const void* from) {
  Part part;
  std::memcpy(&part, from, sizeof(part));
  return part;
}
INLINE Block from_memory(const void* from) {
  return each([&](int i) { return part_at(static_cast<const char*>(from) + i * sizeof(Part)); });
}
INLINE Block same(int byte) {
  return each([&](int) { return OP(set1_epi8)(static_cast<char>(byte)); });
}
// 16 bytes in each lane of 128 bits.
INLINE Block in_each_lane(const void* from) {
  const __m128i all = _mm_loadu_si128(static_cast<const __m128i*>(from));
#if defined(__AVX512BW__)
  return {{_mm512_broadcast_i32x4(all)}};
#else
  const __m256i both = _mm256_broadcastsi128_si256(all);
  return {{both, both}};
#endif
}
// A number of 64 bits for each half of a lane: f(0) to f(7).
template <class F>
INLINE Block halves(F f) {
  alignas(64) int64_t numbers[8];
  for (int i = 0; i < 8; ++i) numbers[i] = f(i);
  return from_memory(numbers);
}
INLINE Block operator|(const Block& x, const Block& y) {
  return each([&](int i) { return x.part[i] | y.part[i]; });
}
INLINE Block operator&(const Block& x, const Block& y) {
  return each([&](int i) { return x.part[i] & y.part[i]; });
}
INLINE Block operator+(const Block& x, const Block& y) {
  return each([&](int i) { return OP(add_epi8)(x.part[i], y.part[i]); });
}
INLINE Block shift_right(const Block& x, const Block& counts) {
  return each([&](int i) { return OP(srlv_epi64)(x.part[i], counts.part[i]); });
}
INLINE Block shift_left(const Block& x, const Block& counts) {
  return each([&](int i) { return OP(sllv_epi64)(x.part[i], counts.part[i]); });
}
// Words of 16 bits, that is, bytes whose upper COUNT bits are then those of another one.
template <int COUNT>
INLINE Block shift_words(const Block& x) {
  return each([&](int i) { return OP(srli_epi16)(x.part[i], COUNT); });
}
INLINE Block shuffle(const Block& table, const Block& index) {
  return each([&](int i) { return OP(shuffle_epi8)(table.part[i], index.part[i]); });
}
// In each lane, the bytes of `next` after those of `x`, from byte 1 on.
INLINE Block next_byte(const Block& next, const Block& x) {
  return each([&](int i) { return OP(alignr_epi8)(next.part[i], x.part[i], 1); });
}
// Of each lane, the first two words of 32 bits of x and y in turn, and the last two.
INLINE Block alternating_low(const Block& x, const Block& y) {
  return each([&](int i) { return OP(unpacklo_epi32)(x.part[i], y.part[i]); });
}
INLINE Block alternating_high(const Block& x, const Block& y) {
  return each([&](int i) { return OP(unpackhi_epi32)(x.part[i], y.part[i]); });
}
// (x ^ y) & mask, and mask ? x : y.
INLINE Block masked_difference(const Block& x, const Block& y, const Block& mask) {
#if defined(__AVX512BW__)
  return {{_mm512_ternarylogic_epi32(x.part[0], y.part[0], mask.part[0], 0x28)}};
#else
  return each([&](int i) { return _mm256_and_si256(_mm256_xor_si256(x.part[i], y.part[i]), mask.part[i]); });
#endif
}
INLINE Block choose(const Block& mask, const Block& x, const Block& y) {
#if defined(__AVX512BW__)
  return {{_mm512_ternarylogic_epi32(mask.part[0], x.part[0], y.part[0], 0xca)}};
#else
  return each([&](int i) {
    return _mm256_or_si256(_mm256_and_si256(mask.part[i], x.part[i]),
                           _mm256_andnot_si256(mask.part[i], y.part[i]));
  });
#endif
}
// A plane of 64 bits: at position p, table `one` where bit p is set, else `zero`.
INLINE Block shuffle_either(const Block& zero, const Block& one, const Block& index, const uint8_t* plane) {
#if defined(__AVX512BW__)
  uint64_t bits;
  std::memcpy(&bits, plane, 8);
  return {{_mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(zero.part[0], index.part[0]), bits, one.part[0],
                                    index.part[0])}};
#else
  const __m256i own_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2,
                                            2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return each([&](int i) {
    int word;
    std::memcpy(&word, plane + 4 * i, 4);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), own_byte), own_bit);
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(zero.part[i], index.part[i]),
                              _mm256_shuffle_epi8(one.part[i], index.part[i]),
                              _mm256_cmpeq_epi8(spread, own_bit));
  });
#endif
}

// Values in the order of products: of a block, kBlockVectors vectors.
struct Values {
  Floats vector[kBlockVectors];
};

// Signed bytes at positions to floats, 2^24 times as large, in the order of the values.
INLINE Values widen(const Block& bytes) {
  Values values;
  for_parts([&](int i) {
    const Part zero = WHOLE(setzero)(), low = OP(unpacklo_epi8)(zero, bytes.part[i]),
               high = OP(unpackhi_epi8)(zero, bytes.part[i]);
    const Part words[4] = {OP(unpacklo_epi16)(zero, low), OP(unpackhi_epi16)(zero, low),
                           OP(unpacklo_epi16)(zero, high), OP(unpackhi_epi16)(zero, high)};
    for (int v = 0; v < 4; ++v) values.vector[v * kParts + i] = OP(cvtepi32_ps)(words[v]);
  });
  return values;
}

// Sums of products of bytes of levels with a vector of integers: 64 of them in two planes of 8 bits, in units
// of 1 and 1 / 128 (where there are instructions for bytes), or in words of 16 bits.
struct Sums {
  Part sum[2] = {WHOLE(setzero)(), WHOLE(setzero)()};

  // `levels` are at least 0, since 128 was added.
  INLINE void add(const Block& levels, const int8_t* high, const int8_t* low, const int16_t* whole) {
    for_parts([&](int i) {
#if defined(__AVX512VNNI__)
      sum[0] = OP(dpbusd_epi32)(sum[0], levels.part[i], part_at(high + i * sizeof(Part)));
      sum[1] = OP(dpbusd_epi32)(sum[1], levels.part[i], part_at(low + i * sizeof(Part)));
#else
      const Part zero = WHOLE(setzero)();
      const int16_t* from = whole + i * sizeof(Part);
      sum[0] = OP(add_epi32)(sum[0], OP(madd_epi16)(OP(unpacklo_epi8)(levels.part[i], zero), part_at(from)));
      sum[1] = OP(add_epi32)(
          sum[1], OP(madd_epi16)(OP(unpackhi_epi8)(levels.part[i], zero), part_at(from + sizeof(Part) / 2)));
#endif
    });
  }

  INLINE int64_t total() const {
#if defined(__AVX512VNNI__)
    return 128 * sum_of_words(sum[0]) + sum_of_words(sum[1]);
#else
    return sum_of_words(sum[0]) + sum_of_words(sum[1]);
#endif
  }

  static INLINE int64_t sum_of_words(Part words) {
#if defined(__AVX512BW__)
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
#else
    const __m256i half = words;
#endif
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
};

}  // namespace
