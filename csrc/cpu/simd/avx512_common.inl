// Primitives of AVX-512 F, BW, DQ and VL that all levels with AVX-512 share.

constexpr int kVectorBytes = 64, kRegisters = 32;
constexpr bool kHasVectorPower = true;

#include "cpu/simd/vector.inl"

template <>
struct Elements<Half> {
  static EMBKERN_INLINE Vector<float> widen(const Half* from) {
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static EMBKERN_INLINE void narrow(Vector<float> vector, Half* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT));
  }
};

EMBKERN_INLINE Vector<float> widen_bf16(const BFloat16* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}

EMBKERN_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
EMBKERN_INLINE Vector<float> square_root(Vector<float> x) { return (Vector<float>)_mm512_sqrt_ps((__m512)x); }
EMBKERN_INLINE Vector<double> square_root(Vector<double> x) {
  return (Vector<double>)_mm512_sqrt_pd((__m512d)x);
}

// 1 / (scale * sqrt(x) + eps). In fp32 two estimates of 14 bits, each with a
// Newton step, replace a square root and a division, which take 20 cycles of Zen 4 for 16 floats; the estimates
// take half of that. The result is within 3 ulp.
template <class T>
EMBKERN_INLINE Vector<T> inverse_of_root(Vector<T> x, T scale, T eps) {
  if constexpr (std::is_same_v<T, float>) {
    using V = Vector<float>;
    const V guess = (V)_mm512_rsqrt14_ps((__m512)x);
    const V root = x * guess;
    V exact = root + (0.5f * guess) * multiply_add(-1.0f * root, root, x);
    // The estimate is infinite at 0 and at subnormal numbers, whose root is taken as 0.
    exact = x < 1.17549435e-38f ? V{} : exact;
    const V divisor = scale * exact + eps;
    const V inverse = (V)_mm512_rcp14_ps((__m512)divisor);
    return inverse + inverse * multiply_add(-1.0f * divisor, inverse, constant(1.0f));
  } else {
    return constant(T(1)) / (scale * square_root(x) + eps);
  }
}

EMBKERN_INLINE void store_streamed(const char* from, char* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
}

// ---- whole numbers of 16 bits -------------------------------------------------------------------------------

EMBKERN_INLINE Costs add_saturated(Costs x, Costs y) {
  return (Costs)_mm512_adds_epu16((__m512i)x, (__m512i)y);
}
EMBKERN_INLINE Differences add_saturated(Differences x, Differences y) {
  return (Differences)_mm512_adds_epi16((__m512i)x, (__m512i)y);
}
EMBKERN_INLINE Costs subtract_saturated(Costs x, Costs y) {
  return (Costs)_mm512_subs_epu16((__m512i)x, (__m512i)y);
}
EMBKERN_INLINE Differences subtract_saturated(Differences x, Differences y) {
  return (Differences)_mm512_subs_epi16((__m512i)x, (__m512i)y);
}
// -2^15 stays.
EMBKERN_INLINE Differences absolute(Differences x) { return (Differences)_mm512_abs_epi16((__m512i)x); }
EMBKERN_INLINE Costs smaller(Costs x, Costs y) { return (Costs)_mm512_min_epu16((__m512i)x, (__m512i)y); }
// x * y / 2^15, rounded, and x * x / 2^15.
EMBKERN_INLINE Differences multiply_rounded(Differences x, Differences y) {
  return (Differences)_mm512_mulhrs_epi16((__m512i)x, (__m512i)y);
}
EMBKERN_INLINE Costs rounded_square(Differences x) { return (Costs)multiply_rounded(x, x); }
// x * y / 2^16, rounded down.
EMBKERN_INLINE Costs multiply_high(Costs x, Costs y) {
  return (Costs)_mm512_mulhi_epu16((__m512i)x, (__m512i)y);
}

// The sum of the squares of the differences of both bytes, which saturate. -128 counts as a difference whose
// square is 3 * 2^14.
EMBKERN_INLINE Costs squares_of_pairs(Differences x, Differences y) {
  const __m512i size = _mm512_abs_epi8(_mm512_subs_epi8((__m512i)x, (__m512i)y));
  return (Costs)_mm512_maddubs_epi16(size, size);
}

EMBKERN_INLINE uint16_t smallest_lane(Costs x) {
  const __m256i half =
      _mm256_min_epu16(_mm512_castsi512_si256((__m512i)x), _mm512_extracti64x4_epi64((__m512i)x, 1));
  const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(quarter)));
}

// Of each lane the least of four vectors, the first one if several have it. Its number takes two bits: of every
// kChoiceLanes lanes the lower ones, then the higher ones.
constexpr int kChoiceLanes = 32;
EMBKERN_INLINE Costs least_of_four(const Costs (&from)[4], uint8_t* choice) {
  const __m512i a = (__m512i)from[0], b = (__m512i)from[1], c = (__m512i)from[2], d = (__m512i)from[3];
  const __m512i low = _mm512_min_epu16(b, a), high = _mm512_min_epu16(d, c);
  const __mmask32 upper = _mm512_cmplt_epu16_mask(high, low);
  const __mmask32 lower = _kor_mask32(_mm512_mask_cmplt_epu16_mask(upper, d, c),
                                      _mm512_mask_cmplt_epu16_mask(_knot_mask32(upper), b, a));
  _store_mask32(reinterpret_cast<__mmask32*>(choice), lower);
  _store_mask32(reinterpret_cast<__mmask32*>(choice + 4), upper);
  return (Costs)_mm512_min_epu16(high, low);
}

// Lane i is lane QUARTER * lanes / 4 + i / 4.
template <int QUARTER>
EMBKERN_INLINE Costs spread_quarter(Costs x) {
  const __m512i lane = _mm512_set_epi16(7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2,
                                        1, 1, 1, 1, 0, 0, 0, 0);
  return (Costs)_mm512_permutexvar_epi16(_mm512_add_epi16(lane, _mm512_set1_epi16(8 * QUARTER)), (__m512i)x);
}

// ---- quantization -------------------------------------------------------------------------------------------

EMBKERN_INLINE void store_bytes(__m512i values, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(values));
}

struct Rounded {
  Vector<float> value;
  __m512i code;
};

// The nearest of 2^BITS ascending levels, by binary search among the edges between them; BITS <= 4.
template <int BITS>
EMBKERN_INLINE Rounded nearest_level(Vector<float> values, const float* edges, const float* levels) {
  const __m512 all_edges = _mm512_loadu_ps(edges);
  __m512i code = _mm512_setzero_si512();
  EMBKERN_UNROLL for (int step = 1 << (BITS - 1); step > 0; step /= 2) {
    const __m512i middle = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
    const __mmask16 above =
        _mm512_cmp_ps_mask((__m512)values, _mm512_permutexvar_ps(middle, all_edges), _CMP_GT_OQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  }
  return {(Vector<float>)_mm512_permutexvar_ps(code, _mm512_loadu_ps(levels)), code};
}

// The nearest of 2^BITS multiples of `step`, which lie around zero. The result is in units of the step.
template <int BITS>
EMBKERN_INLINE Rounded nearest_step(Vector<float> values, float step) {
  constexpr int kMost = (1 << BITS) - 1;
  constexpr float kMiddle = kMost / 2.0f;
  const __m512 steps = _mm512_fmadd_ps((__m512)values, _mm512_set1_ps(1 / step), _mm512_set1_ps(kMiddle));
  const __m512i above = _mm512_max_epi32(_mm512_cvtps_epi32(steps), _mm512_setzero_si512());
  const __m512i code = _mm512_min_epi32(above, _mm512_set1_epi32(kMost));
  return {(Vector<float>)_mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(kMiddle)), code};
}

EMBKERN_INLINE void store_codes(const Rounded& rounded, uint8_t* to) { store_bytes(rounded.code, to); }

#include "cpu/simd/power.inl"

EMBKERN_INLINE Vector<float> times_power_of_two(Vector<float> x, Vector<float> whole) {
  return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)whole);
}

#include "cpu/simd/exponential.inl"

// ---- groups of a packed table -------------------------------------------------------------------------------

// The codes of the 32 values of a group of 5 to 8 bits, a word each, in the order that two unpacking
// instructions take: lane i of 128 bits has those of values 4 i to 4 i + 3 and 16 + 4 i to 16 + 4 i + 3.
struct GroupCodes {
  __m512i words;
};

EMBKERN_INLINE void to_floats(const GroupCodes& codes, Vector<float>* values) {
  const __m512i zero = _mm512_setzero_si512();
  values[0] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(codes.words, zero));
  values[1] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(codes.words, zero));
}

// 64 bytes by position.
struct Block {
  __m512i bytes;
};

// 16 bytes in each lane.
struct Table16 {
  __m512i lanes;
};

EMBKERN_INLINE __m512i in_each_lane(const void* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

EMBKERN_INLINE Table16 table_of_16(const int8_t* entries) { return {in_each_lane(entries)}; }

EMBKERN_INLINE __m512i shifted_by_lane(__m512i bytes) {
  return _mm512_srlv_epi64(bytes, _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0));
}

// The windows of 64 steps of a stream: byte 0 of lane 0 is its first one. `next` are the bytes from byte 8 on.
EMBKERN_INLINE Block windows_of(__m512i lanes, __m512i next) {
  const __m512i left = _mm512_set_epi64(58, 58, 60, 60, 62, 62, 64, 64);
  return {_mm512_or_si512(shifted_by_lane(lanes), _mm512_sllv_epi64(next, left))};
}

// The windows of 64 steps; 6 words are read.
EMBKERN_INLINE Block windows(const int32_t* from) {
  return windows_of(in_each_lane(from), in_each_lane(from + 2));
}

// The same of fewer words, after which `after` follows; windows behind it are arbitrary. No more is read.
EMBKERN_INLINE Block last_windows(const int32_t* from, int64_t words, int32_t after) {
  const __mmask8 end = static_cast<__mmask8>(words < 0 ? 0 : 1 << words);
  const __m256i some = _mm256_maskz_loadu_epi32(static_cast<__mmask8>(end - (words < 0 ? 0 : 1)), from);
  const __m256i all = _mm256_mask_set1_epi32(some, end, after);
  return windows_of(_mm512_broadcast_i32x4(_mm256_castsi256_si128(all)),
                    _mm512_broadcast_i32x4(_mm256_castsi256_si128(_mm256_alignr_epi32(all, all, 2))));
}

// The byte after each one; `next` is the block after `block`.
EMBKERN_INLINE Block next_bytes(const Block& block, const Block& next) {
  return {_mm512_alignr_epi8(next.bytes, block.bytes, 1)};
}

EMBKERN_INLINE Block operator+(const Block& x, const Block& y) { return {_mm512_add_epi8(x.bytes, y.bytes)}; }

// The lowest four bits are those of every byte, shifted; others are arbitrary.
template <int COUNT>
EMBKERN_INLINE Block shifted_right(const Block& x) {
  return {_mm512_srli_epi16(x.bytes, COUNT)};
}

EMBKERN_INLINE Block high_nibbles(const Block& x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.bytes, 4), _mm512_set1_epi8(15))};
}

// (x ^ y) & 15
EMBKERN_INLINE Block low_nibbles_of_difference(const Block& x, const Block& y) {
  return {_mm512_ternarylogic_epi32(x.bytes, y.bytes, _mm512_set1_epi8(15), 0x28)};
}

EMBKERN_INLINE Block look_up(const Table16& table, const Block& index) {
  return {_mm512_shuffle_epi8(table.lanes, index.bytes)};
}

// In table `one` where the further bit of a value is set, else in `zero`: bit i of byte j of a group's word is
// that of byte i of the group in lane j. One word is read unless `two` groups are there.
EMBKERN_INLINE Block look_up_either(const Table16& zero, const Table16& one, const Block& index,
                                    const int32_t* further, bool two) {
  const __m512i words = two ? _mm512_set1_epi64(load_as<int64_t>(further)) : _mm512_set1_epi32(*further);
  const __m512i own_byte =
      _mm512_set_epi64(0x0707070707070707, 0x0303030303030303, 0x0606060606060606, 0x0202020202020202,
                       0x0505050505050505, 0x0101010101010101, 0x0404040404040404, 0);
  const __m512i own_bit = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201ull));
  const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(words, own_byte), own_bit);
  return {_mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(zero.lanes, index.bytes), set, one.lanes, index.bytes)};
}

// `index` with its two lowest bits replaced by the further bits of every value, bits 2 j and 2 j + 1 of its
// byte of the two words of a group. Those of one group are read unless `two` are there.
EMBKERN_INLINE Block with_further_bits(const Block& index, const int32_t* further, bool two) {
  const __m512i words = two ? in_each_lane(further) : _mm512_set1_epi64(load_as<int64_t>(further));
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi8(3), shifted_by_lane(words), index.bytes, 0xca)};
}

// Of each lane, the first two words of x and y in turn, and the last two.
EMBKERN_INLINE Block interleave_low(const Block& x, const Block& y) {
  return {_mm512_unpacklo_epi32(x.bytes, y.bytes)};
}
EMBKERN_INLINE Block interleave_high(const Block& x, const Block& y) {
  return {_mm512_unpackhi_epi32(x.bytes, y.bytes)};
}

constexpr float kWidenedUnit = 1.0f / (1 << 24);  // of the floats that `widen` makes

// The 32 signed bytes of group GROUP, 0 or 1, of a block.
template <int GROUP>
EMBKERN_INLINE void widen(const Block& block, Vector<float>* values) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i words =
      GROUP ? _mm512_unpackhi_epi8(zero, block.bytes) : _mm512_unpacklo_epi8(zero, block.bytes);
  values[0] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpacklo_epi16(zero, words));
  values[1] = (Vector<float>)_mm512_cvtepi32_ps(_mm512_unpackhi_epi16(zero, words));
}
