// Primitives of AVX2, FMA and F16C.

constexpr int kVectorBytes = 32, kRegisters = 16;
constexpr bool kHasVectorPower = true;

#include "cpu/simd/vector.inl"

template <>
struct Elements<Half> {
  static EMBKERN_INLINE Vector<float> widen(const Half* from) {
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static EMBKERN_INLINE void narrow(Vector<float> vector, Half* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Elements<BFloat16> {
  static EMBKERN_INLINE Vector<float> widen(const BFloat16* from) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
  }
  // Rounds to nearest even; every NaN becomes 0x7fc0.
  static EMBKERN_INLINE void narrow(Vector<float> vector, BFloat16* to) {
    const __m256i bits = (__m256i)vector;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
    const __m256 rounded = _mm256_blendv_ps((__m256)even, (__m256)_mm256_set1_epi32(0x7fc00000), nan);
    const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
};

EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm256_sqrt_ps((__m256)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm256_sqrt_pd((__m256d)x);
}

EMBKERN_INLINE void store_streamed(const char* from, char* to) {
  EMBKERN_UNROLL for (int at = 0; at < 64; at += 32) _mm256_stream_si256(
      reinterpret_cast<__m256i*>(to + at), _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at)));
}

// ---- whole numbers of 16 bits -------------------------------------------------------------------------------

EMBKERN_INLINE Costs add_saturated(Costs x, Costs y) {
  return (Costs)_mm256_adds_epu16((__m256i)x, (__m256i)y);
}
EMBKERN_INLINE Differences add_saturated(Differences x, Differences y) {
  return (Differences)_mm256_adds_epi16((__m256i)x, (__m256i)y);
}
EMBKERN_INLINE Costs subtract_saturated(Costs x, Costs y) {
  return (Costs)_mm256_subs_epu16((__m256i)x, (__m256i)y);
}
EMBKERN_INLINE Differences subtract_saturated(Differences x, Differences y) {
  return (Differences)_mm256_subs_epi16((__m256i)x, (__m256i)y);
}
// -2^15 stays.
EMBKERN_INLINE Differences absolute(Differences x) { return (Differences)_mm256_abs_epi16((__m256i)x); }
EMBKERN_INLINE Costs smaller(Costs x, Costs y) { return (Costs)_mm256_min_epu16((__m256i)x, (__m256i)y); }
// x * y / 2^15, rounded, and x * x / 2^15.
EMBKERN_INLINE Differences multiply_rounded(Differences x, Differences y) {
  return (Differences)_mm256_mulhrs_epi16((__m256i)x, (__m256i)y);
}
EMBKERN_INLINE Costs rounded_square(Differences x) { return (Costs)multiply_rounded(x, x); }
// x * y / 2^16, rounded down.
EMBKERN_INLINE Costs multiply_high(Costs x, Costs y) {
  return (Costs)_mm256_mulhi_epu16((__m256i)x, (__m256i)y);
}

// The sum of the squares of the differences of both bytes, which saturate. -128 counts as a difference whose
// square is 3 * 2^14.
EMBKERN_INLINE Costs squares_of_pairs(Differences x, Differences y) {
  const __m256i size = _mm256_abs_epi8(_mm256_subs_epi8((__m256i)x, (__m256i)y));
  return (Costs)_mm256_maddubs_epi16(size, size);
}

EMBKERN_INLINE uint16_t smallest_lane(Costs x) {
  const __m128i half =
      _mm_min_epu16(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(half)));
}

// Of each lane the least of four vectors, the first one if several have it. Its number takes two bits: of every
// kChoiceLanes lanes the lower ones, then the higher ones.
constexpr int kChoiceLanes = 8;
EMBKERN_INLINE Costs least_of_four(const Costs (&from)[4], uint8_t* choice) {
  const __m256i a = (__m256i)from[0], b = (__m256i)from[1], c = (__m256i)from[2], d = (__m256i)from[3];
  const __m256i low = _mm256_min_epu16(b, a), high = _mm256_min_epu16(d, c),
                least = _mm256_min_epu16(high, low);
  // There is no comparison without a sign other than for equality, so bits that are not set are found.
  const __m256i not_upper = _mm256_cmpeq_epi16(least, low);
  const __m256i not_lower =
      _mm256_blendv_epi8(_mm256_cmpeq_epi16(high, c), _mm256_cmpeq_epi16(low, a), not_upper);
  const int masks = ~_mm256_movemask_epi8(_mm256_packs_epi16(not_lower, not_upper));
  std::memcpy(choice, &masks, sizeof(masks));
  return (Costs)least;
}

// Lane i is lane QUARTER * lanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Costs spread_quarter(Costs x) {
  const __m256i word = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5,
                                        6, 7, 6, 7, 6, 7, 6, 7);
  return (Costs)_mm256_shuffle_epi8(_mm256_permute4x64_epi64((__m256i)x, 0x55 * QUARTER), word);
}

#include "cpu/simd/lanewise.inl"
#include "cpu/simd/power.inl"

// x * 2^whole in two factors, so that the result may be subnormal or infinite; |whole| <= 250.
EMBKERN_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> whole) {
  const Integers n = __builtin_convertvector(whole, Integers), half = n >> 1;
  return x * (Vector<float>)((half + 127) << 23) * (Vector<float>)((n - half + 127) << 23);
}

#include "cpu/simd/exponential.inl"

// ---- groups of a packed table -------------------------------------------------------------------------------

// The codes of the 32 values of a group of 5 to 8 bits, a byte each.
using GroupCodes = __m256i;

// Lane by lane, whether each byte has its own one of the 64 bits of 8 bytes: bytes 8 i to 8 i + 7 test byte
// OWN[i] of `words`.
template <int... OWN>
EMBKERN_INLINE __m256i tested_bits(__m256i words) {
  constexpr int64_t kEach = 0x0101010101010101;
  const __m256i own_byte = _mm256_setr_epi64x((OWN * kEach)...);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(words, own_byte), own_bit), own_bit);
}

template <int BITS>
EMBKERN_INLINE GroupCodes group_codes(const int32_t* words) {
  __m256i codes = _mm256_setzero_si256();
  EMBKERN_UNROLL for (int bit = 0; bit < BITS; ++bit) {
    const __m256i set = tested_bits<0, 1, 2, 3>(_mm256_set1_epi32(words[bit]));
    codes = _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << bit))));
  }
  return codes;
}

EMBKERN_INLINE void to_floats(const GroupCodes& codes, Vector<float>* values) {
  const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
  values[0] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
  values[1] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
  values[2] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
  values[3] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
}

// 64 bytes by position, in two halves.
struct Block {
  __m256i low, high;
};

// 16 bytes in each lane.
struct Table16 {
  __m256i lanes;
};

EMBKERN_INLINE __m256i in_both_lanes(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

EMBKERN_INLINE Table16 table_of_16(const int8_t* entries) { return {in_both_lanes(entries)}; }

// 16 bytes in each lane, shifted by twice its number.
EMBKERN_INLINE Block shifted_by_lane(__m256i lanes) {
  return {_mm256_srlv_epi64(lanes, _mm256_setr_epi64x(0, 0, 2, 2)),
          _mm256_srlv_epi64(lanes, _mm256_setr_epi64x(4, 4, 6, 6))};
}

// The windows of 64 steps of a stream: byte 0 of lane 0 is its first one. `next` are the bytes from byte 8 on.
EMBKERN_INLINE Block windows_of(__m256i lanes, __m256i next) {
  const Block own = shifted_by_lane(lanes);
  return {_mm256_or_si256(own.low, _mm256_sllv_epi64(next, _mm256_setr_epi64x(64, 64, 62, 62))),
          _mm256_or_si256(own.high, _mm256_sllv_epi64(next, _mm256_setr_epi64x(60, 60, 58, 58)))};
}

// The windows of 64 steps; 6 words are read.
EMBKERN_INLINE Block windows(const int32_t* from) {
  return windows_of(in_both_lanes(from), in_both_lanes(from + 2));
}

// The same of fewer words, after which `after` follows; windows behind it are arbitrary. No more is read.
EMBKERN_INLINE Block last_windows(const int32_t* from, int64_t words, int32_t after) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i count = _mm256_set1_epi32(static_cast<int>(words));
  const __m256i some = _mm256_maskload_epi32(from, _mm256_cmpgt_epi32(count, place));
  const __m256i all = _mm256_blendv_epi8(some, _mm256_set1_epi32(after), _mm256_cmpeq_epi32(count, place));
  return windows_of(_mm256_permute4x64_epi64(all, 0x44), _mm256_permute4x64_epi64(all, 0x99));
}

// The byte after each one; `next` is the block after `block`.
EMBKERN_INLINE Block next_bytes(const Block& block, const Block& next) {
  return {_mm256_alignr_epi8(next.low, block.low, 1), _mm256_alignr_epi8(next.high, block.high, 1)};
}

EMBKERN_INLINE Block operator+(const Block& x, const Block& y) {
  return {_mm256_add_epi8(x.low, y.low), _mm256_add_epi8(x.high, y.high)};
}

// The lowest four bits are those of every byte, shifted; others are arbitrary.
template <int COUNT>
EMBKERN_INLINE Block shifted_right(const Block& x) {
  return {_mm256_srli_epi16(x.low, COUNT), _mm256_srli_epi16(x.high, COUNT)};
}

EMBKERN_INLINE Block high_nibbles(const Block& x) {
  const Block shifted = shifted_right<4>(x);
  const __m256i nibble = _mm256_set1_epi8(15);
  return {_mm256_and_si256(shifted.low, nibble), _mm256_and_si256(shifted.high, nibble)};
}

// (x ^ y) & 15
EMBKERN_INLINE Block low_nibbles_of_difference(const Block& x, const Block& y) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_xor_si256(x.low, y.low), nibble),
          _mm256_and_si256(_mm256_xor_si256(x.high, y.high), nibble)};
}

EMBKERN_INLINE Block look_up(const Table16& table, const Block& index) {
  return {_mm256_shuffle_epi8(table.lanes, index.low), _mm256_shuffle_epi8(table.lanes, index.high)};
}

// In table `one` where the further bit of a value is set, else in `zero`: bit i of byte j of a group's word is
// that of byte i of the group in lane j. One word is read unless `two` groups are there.
EMBKERN_INLINE Block look_up_either(const Table16& zero, const Table16& one, const Block& index,
                                    const int32_t* further, bool two) {
  const __m256i words = two ? _mm256_set1_epi64x(load_as<int64_t>(further)) : _mm256_set1_epi32(*further);
  const Block zeros = look_up(zero, index), ones = look_up(one, index);
  return {_mm256_blendv_epi8(zeros.low, ones.low, tested_bits<0, 4, 1, 5>(words)),
          _mm256_blendv_epi8(zeros.high, ones.high, tested_bits<2, 6, 3, 7>(words))};
}

// `index` with its two lowest bits replaced by the further bits of every value, bits 2 j and 2 j + 1 of its
// byte of the two words of a group. Those of one group are read unless `two` are there.
EMBKERN_INLINE Block with_further_bits(const Block& index, const int32_t* further, bool two) {
  const Block own =
      shifted_by_lane(two ? in_both_lanes(further) : _mm256_set1_epi64x(load_as<int64_t>(further)));
  const __m256i lowest = _mm256_set1_epi8(3);
  return {_mm256_or_si256(_mm256_and_si256(lowest, own.low), _mm256_andnot_si256(lowest, index.low)),
          _mm256_or_si256(_mm256_and_si256(lowest, own.high), _mm256_andnot_si256(lowest, index.high))};
}

// Of each lane, the first two words of x and y in turn, and the last two.
EMBKERN_INLINE Block interleave_low(const Block& x, const Block& y) {
  return {_mm256_unpacklo_epi32(x.low, y.low), _mm256_unpacklo_epi32(x.high, y.high)};
}
EMBKERN_INLINE Block interleave_high(const Block& x, const Block& y) {
  return {_mm256_unpackhi_epi32(x.low, y.low), _mm256_unpackhi_epi32(x.high, y.high)};
}

constexpr float kWidenedUnit = 1.0f / (1 << 24);  // of the floats that `widen` makes

// The 32 signed bytes of group GROUP, 0 or 1, of a block.
template <int GROUP>
EMBKERN_INLINE void widen(const Block& block, Vector<float>* values) {
  const __m256i zero = _mm256_setzero_si256();
  EMBKERN_UNROLL for (int half = 0; half < 2; ++half) {
    const __m256i bytes = half ? block.high : block.low;
    const __m256i words = GROUP ? _mm256_unpackhi_epi8(zero, bytes) : _mm256_unpacklo_epi8(zero, bytes);
    values[half] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_unpacklo_epi16(zero, words));
    values[2 + half] = (Vector<float>)_mm256_cvtepi32_ps(_mm256_unpackhi_epi16(zero, words));
  }
}
