// Decoders of the trellis of the format embkern.packed/1.
#pragma once
#include <utility>

#include "streams.h"

namespace {

// States of 7 bits, rings of 32 values, a plane of 32 bits per bit of a code, values in their own order.
// PLANES: the index is composed plane by plane, with GFNI as the extension does it; else window by window, as
// the extension does it without GFNI: the bits of an index that come from one plane are side by side, so that
// two bytes of the plane and a shift bring them to their place.
template <int BITS, bool PLANES>
class Planes128 {
 public:
  static constexpr int kBits = BITS;
  explicit Planes128(const Tables& tables, int) {
    alignas(64) int16_t own[128];
    for (int i = 0; i < 128; ++i) own[i] = tables.words[PLANES ? i : state_of(i)];
#if defined(__AVX512BW__)
    for (int i = 0; i < 4; ++i) quarter_[i] = part_at(own + 32 * i);
#else
    for (int i = 0; i < 8; ++i) {
      const __m256i some = part_at(own + 16 * i);
      low_[i] = both_halves(some & _mm256_set1_epi16(255)), high_[i] = both_halves(_mm256_srli_epi16(some, 8));
    }
#endif
    for (int plane = 0; plane < BITS; ++plane) windows_[plane] = Window(plane);
  }

  template <class Use>
  INLINE void run(const uint8_t* row, int blocks, Use use) const {
    for (int block = 0; block < blocks; ++block) {
      Values values;
      for (int half = 0; half < 2; ++half) {
        const uint8_t* words = row + 8 * BITS * block + 4 * BITS * half;
        group(reinterpret_cast<const uint32_t*>(words), values.vector + half * kBlockVectors / 2);
      }
      use(block, values);
    }
  }

  static float level(const Tables& tables, const uint8_t* row, int, int block, int value) {
    const uint8_t* words = row + 8 * BITS * block + 4 * BITS * (value / 32);
    int state = 0;
    for (int bit = 0; bit < 7; ++bit)
      state |= bit_of(words + 4 * (bit % BITS), (value + 32 - bit / BITS) % 32) << bit;
    return tables.words[state] * kUnit;
  }

 private:
  // Bits of the state that come from a plane, and where they begin in the index of a window.
  static constexpr int bits_of(int plane) { return (7 - plane + BITS - 1) / BITS; }
  static constexpr int begin_of(int plane) {
    int begin = 0;
    for (int p = 0; p < plane; ++p) begin += bits_of(p);
    return begin;
  }
  static int state_of(int index) {
    int state = 0;
    for (int plane = 0; plane < BITS; ++plane)
      for (int i = 0; i < bits_of(plane); ++i)
        state |= (index >> (begin_of(plane) + i) & 1) << ((bits_of(plane) - 1 - i) * BITS + plane);
    return state;
  }
  // The place in its plane of the lowest bit of the index of value 0.
  static constexpr int first_of(int plane) { return 64 - (bits_of(plane) - 1) - begin_of(plane); }

  template <int BIT>
  static INLINE uint32_t plane(const uint32_t* words) {
    constexpr int kBefore = BIT / BITS;
    const uint32_t word = words[BIT % BITS];
    return kBefore ? word << kBefore | word >> (32 - kBefore) % 32 : word;
  }
  template <class Use, int... BIT>
  static INLINE void for_planes(const uint32_t* words, Use use, std::integer_sequence<int, BIT...>) {
    (use(BIT, plane<BIT>(words)), ...);
  }

  // The index of all planes below PLANE and of their windows above its own.
  template <int PLANE = 0>
  INLINE Part windows(const uint32_t* words) const {
    const Part own = windows_[PLANE].of(words[PLANE]);
    if constexpr (PLANE + 1 == BITS) {
      return own;
    } else {
      const Part others = windows<PLANE + 1>(words);
#if defined(__AVX512BW__)
      const Part mask = _mm512_set1_epi16((1 << begin_of(PLANE + 1)) - 1);
      return _mm512_ternarylogic_epi32(mask, own, others, 0xca);
#else
      const Part mask = _mm256_set1_epi8((1 << begin_of(PLANE + 1)) - 1);
      return _mm256_or_si256(_mm256_and_si256(mask, own), _mm256_andnot_si256(mask, others));
#endif
    }
  }

#if defined(__AVX512BW__)
  static constexpr float kUnit = 65536;

  // Which two bytes of a plane make a word for each value, in the order of two unpacking instructions, and its
  // shift.
  struct Window {
    Part bytes, shifts;
    Window() = default;
    explicit Window(int plane) {
      alignas(64) uint8_t pairs[64];
      alignas(64) uint16_t counts[32];
      for (int i = 0; i < 32; ++i) {
        const int first = (i % 8 / 4 * 16 + i / 8 * 4 + i % 4 + first_of(plane)) % 32;
        pairs[2 * i] = first / 8, pairs[2 * i + 1] = (first / 8 + 1) % 4, counts[i] = first % 8;
      }
      bytes = part_at(pairs), shifts = part_at(counts);
    }
    INLINE Part of(uint32_t word) const {
      return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(word)), bytes), shifts);
    }
  };

  INLINE Part composed(const uint32_t* words) const {
#if defined(__GFNI__) && defined(__AVX512VBMI__)
    const __m256i record = _mm256_maskz_loadu_epi32((1 << BITS) - 1, words);
    const __m256i rotated = _mm256_rolv_epi32(_mm256_maskz_permutexvar_epi32(0xfe, planes_, record), before_);
    return _mm512_gf2p8affine_epi64_epi8(values_,
                                         _mm512_permutexvar_epi8(bytes_, _mm512_castsi256_si512(rotated)), 0);
#else
    __m256i parts[2] = {};
    for_planes(
        words,
        [&](int bit, uint32_t plane) {
          parts[bit % 2] =
              _mm256_mask_add_epi8(parts[bit % 2], plane, parts[bit % 2], _mm256_set1_epi8(1 << bit));
        },
        std::make_integer_sequence<int, 7>{});
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(_mm256_or_si256(parts[0], parts[1]), order));
#endif
  }

  INLINE void group(const uint32_t* words, Floats* values) const {
    const Part index = PLANES ? composed(words) : windows(words), zero = _mm512_setzero_si512();
    const Part entries = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                                 _mm512_permutex2var_epi16(quarter_[0], index, quarter_[1]),
                                                 _mm512_permutex2var_epi16(quarter_[2], index, quarter_[3]));
    values[0] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(zero, entries));
    values[1] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(zero, entries));
  }

  Part quarter_[4];
#if defined(__GFNI__) && defined(__AVX512VBMI__)
  // A word per bit of the index, the highest first, and bytes of 8 values side by side, 8 x 8 bits of which an
  // instruction transposes.
  template <class F>
  static INLINE __m256i eighths(F f) {
    return _mm256_setr_epi32(f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7));
  }
  __m256i planes_ = eighths([](int i) { return (7 - i) % BITS; });
  __m256i before_ = eighths([](int i) { return (7 - i) / BITS; });
  Part bytes_ = _mm512_set_epi32(0x1f1b1713, 0x0f0b0703, 0x1d191511, 0x0d090501, 0x1f1b1713, 0x0f0b0703,
                                 0x1d191511, 0x0d090501, 0x1e1a1612, 0x0e0a0602, 0x1c181410, 0x0c080400,
                                 0x1e1a1612, 0x0e0a0602, 0x1c181410, 0x0c080400);
  Part values_ = halves([](int i) { return i / 2 % 2 ? 0x0080004000200010 : 0x0008000400020001; }).part[0];
#endif
#else
  static constexpr float kUnit = 1;

  // A byte per value: the plane, rotated. Value 8 k + j is byte k of the j-th word.
  struct Window {
    Part right, left;
    Window() = default;
    explicit Window(int plane) {
      alignas(32) int32_t counts[8];
      for (int j = 0; j < 8; ++j) counts[j] = (j + first_of(plane)) % 32;
      right = part_at(counts), left = _mm256_sub_epi32(_mm256_set1_epi32(32), right);
    }
    INLINE Part of(uint32_t word) const {
      const __m256i all = _mm256_set1_epi32(static_cast<int>(word));
      return _mm256_or_si256(_mm256_srlv_epi32(all, right), _mm256_sllv_epi32(all, left));
    }
  };

  static INLINE __m256i in_order(__m256i index) {
    const __m256i transposed = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8,
                                                12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(index, transposed),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static INLINE __m256i composed(const uint32_t* words) {
    const __m256i own_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2,
                                              2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    __m256i index = _mm256_setzero_si256();
    for_planes(
        words,
        [&](int bit, uint32_t plane) {
          const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(plane)), own_byte);
          const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own_bit), own_bit);
          index = _mm256_or_si256(index, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << bit))));
        },
        std::make_integer_sequence<int, 7>{});
    return index;
  }
  static INLINE __m256i both_halves(__m256i numbers) {
    return _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1)));
  }
  static INLINE __m256i look_up(const __m256i* tables, __m256i index) {
    __m256i found[8];
    for (int i = 0; i < 8; ++i) found[i] = _mm256_shuffle_epi8(tables[i], index);
    for (int bit = 4; bit < 7; ++bit) {
      const __m256i chosen = _mm256_slli_epi16(index, 7 - bit);
      for (int i = 0; i < 1 << (6 - bit); ++i)
        found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], chosen);
    }
    return found[0];
  }
  static INLINE Floats to_float(__m128i integers) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(integers));
  }

  INLINE void group(const uint32_t* words, Floats* values) const {
    const __m256i index =
        PLANES ? composed(words) : in_order(_mm256_and_si256(windows(words), _mm256_set1_epi8(127)));
    const __m256i low = look_up(low_, index), high = look_up(high_, index);
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    values[0] = to_float(_mm256_castsi256_si128(even)), values[1] = to_float(_mm256_castsi256_si128(odd));
    values[2] = to_float(_mm256_extracti128_si256(even, 1)),
    values[3] = to_float(_mm256_extracti128_si256(odd, 1));
  }

  __m256i low_[8], high_[8];
#endif
  Window windows_[BITS];
};

}  // namespace
